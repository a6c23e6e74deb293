"""TODO: what lives in submit, in one sentence."""
