"""TODO: what lives in metrics, in one sentence."""
