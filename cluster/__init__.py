"""Command line, Python API, recipes, launching, evaluation and tracking: everything that uses Ray or MLflow."""
