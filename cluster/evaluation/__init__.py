"""Evaluation actors, their pool, and the service that evaluates the checkpoints of a run."""
