"""Models in MLflow's registry: choose a checkpoint, package it, register it, and serve predictions from it."""
