"""TODO: what lives in inference, in one sentence."""
