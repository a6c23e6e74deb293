"""Metric states that are keyed by image and merge in any order."""
