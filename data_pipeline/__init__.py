"""From raw data set and bucket to batch: readers, shards, manifest, order, augmentation, loader."""
