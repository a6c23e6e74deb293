"""TODO: what lives in transforms, in one sentence."""
