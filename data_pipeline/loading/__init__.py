"""Reading of samples from shards, and their decoding into batches in worker processes."""
