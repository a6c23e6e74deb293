"""TODO: what lives in compare, in one sentence."""
