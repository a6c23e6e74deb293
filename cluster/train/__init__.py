"""The supervisor of a training run, with Ray or with plain processes, and what it talks to."""
