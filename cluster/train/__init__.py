"""The supervisor of a training run, and its two launchers: Ray Train and plain local processes."""
