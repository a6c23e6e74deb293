"""Saving, committing, listing and resuming checkpoints."""
