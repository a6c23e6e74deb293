"""TODO: what lives in order, in one sentence."""
