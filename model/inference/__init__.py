"""Conversion of raw predictions to panoptic, instance and semantic results."""
