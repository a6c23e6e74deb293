"""Checks and decisions that are made before the first rank of a run starts."""
