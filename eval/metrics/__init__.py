"""Metric states that hold records by image and merge in any order."""
