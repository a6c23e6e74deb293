"""Fast forward passes, and conversion of raw predictions to panoptic, instance and semantic results."""
