"""Augmentation of images and targets, and their collation into a batch."""
