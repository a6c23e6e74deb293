"""Counts of multiply-adds, by the paper's rules and as executed."""
