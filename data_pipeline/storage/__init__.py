"""TODO: what lives in storage, in one sentence."""
