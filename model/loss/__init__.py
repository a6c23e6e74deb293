"""TODO: what lives in loss, in one sentence."""
