"""Augmentation of images and targets, and collation into batches."""
