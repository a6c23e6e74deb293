"""Read samples from shards, and decode them into batches in worker processes."""
