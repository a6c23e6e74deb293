"""Metrics, inference, reports and scoring. Import from the modules only: the name `eval` would hide the builtin."""
