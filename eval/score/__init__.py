"""Scoring of prediction files for `m2f score`: formats of COCO and Cityscapes, and label maps."""
