"""Compare runs from MLflow or from run folders, and report the differences, for `m2f compare`."""
