"""TODO: what lives in weights, in one sentence."""
