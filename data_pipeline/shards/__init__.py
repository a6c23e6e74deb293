"""TODO: what lives in shards, in one sentence."""
