"""TODO: what lives in train, in one sentence."""
