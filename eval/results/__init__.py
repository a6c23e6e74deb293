"""TODO: what lives in results, in one sentence."""
