"""Writing a run to MLflow through a journal on disk."""
