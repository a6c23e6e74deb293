"""Scoring of prediction files in the formats of COCO and Cityscapes, for `m2f score`."""
