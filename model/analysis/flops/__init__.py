"""Counts of floating-point operations, by the paper's rules and as executed."""
