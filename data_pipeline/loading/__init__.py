"""Reading samples from shards and decoding them into batches, in worker processes."""
