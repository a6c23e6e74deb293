"""Metrics as mergeable states, inference, reports. Import from its modules only: `eval` is also a builtin."""
