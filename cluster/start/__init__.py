"""Checks and decisions before the first rank of a run starts."""
