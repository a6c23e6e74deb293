"""TODO: what lives in backbones, in one sentence."""
