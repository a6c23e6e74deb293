"""Comparisons of our code with peers: one module per NAME of `python -m benchmarks`, and what they share."""
