"""TODO: what lives in doctor, in one sentence."""
