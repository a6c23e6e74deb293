"""TODO: what lives in export, in one sentence."""
