"""Command line, launching, evaluation and tracking: everything that uses Ray or MLflow."""
