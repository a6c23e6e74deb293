"""TODO: what lives in memory, in one sentence."""
