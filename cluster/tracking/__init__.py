"""Write a run to MLflow through a journal on disk."""
