"""TODO: what lives in score, in one sentence."""
