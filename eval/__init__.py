"""Mergeable metrics, inference and reports. Import from its modules only, because `eval` is also a builtin."""
