"""TODO: what lives in loading, in one sentence."""
