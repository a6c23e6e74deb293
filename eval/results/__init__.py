"""The numbers of an evaluation, computed from metric states."""
