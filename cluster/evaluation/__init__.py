"""Evaluation of checkpoints: the actors, their pool, and the service that evaluates every checkpoint of a run."""
