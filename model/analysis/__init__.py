"""TODO: what lives in analysis, in one sentence."""
