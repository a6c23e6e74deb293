"""TODO: what lives in predict, in one sentence."""
