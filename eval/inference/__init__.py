"""Inference for evaluation: on whole images, in windows or with test-time augmentation."""
