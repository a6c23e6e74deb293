"""Running a model on images for evaluation, whole, in windows or with test-time augmentation."""
