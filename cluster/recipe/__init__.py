"""TODO: what lives in recipe, in one sentence."""
