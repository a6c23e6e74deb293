"""Adaptations of readers: a part of the samples, a background class, or tiles."""
