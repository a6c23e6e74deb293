"""The recipe of a run: its dataclass, reading and writing YAML, overrides and paths."""
