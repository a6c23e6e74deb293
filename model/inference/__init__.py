"""Convert raw predictions to panoptic, instance and semantic results."""
