"""TODO: what lives in engine, in one sentence."""
