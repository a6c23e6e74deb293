"""Extra metrics, computed only on request: one module per metric, listed in `EXTRA_METRICS` (`eval/config.py`)."""
