"""Evaluation of checkpoints: actors, their pool, and the service that evaluates every checkpoint of a run."""
