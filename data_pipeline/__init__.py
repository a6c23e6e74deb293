"""The path from a raw data set to a training batch: readers, shards, manifest, order, augmentation and loader."""
