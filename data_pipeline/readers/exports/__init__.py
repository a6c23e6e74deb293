"""Readers of what labelling tools export."""
