"""TODO: what lives in flops, in one sentence."""
