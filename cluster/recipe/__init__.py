"""The recipe of a run: its dataclasses, YAML reading and writing, overrides, and paths."""
