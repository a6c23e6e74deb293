"""Training of one rank: engine, loop, schedule and checkpoints. Independent of Ray and MLflow."""
