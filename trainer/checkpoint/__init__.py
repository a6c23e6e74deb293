"""TODO: what lives in checkpoint, in one sentence."""
