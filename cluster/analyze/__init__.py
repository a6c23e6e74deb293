"""TODO: what lives in analyze, in one sentence."""
