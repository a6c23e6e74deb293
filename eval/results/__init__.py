"""Results of an evaluation, computed from metric states."""
