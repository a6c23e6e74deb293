"""Models of runs in MLflow's registry: which checkpoint, what goes with it, and how it answers when it is served."""
