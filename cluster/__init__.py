"""Ray and MLflow: the command line, launching, the evaluation pool, tracking."""
