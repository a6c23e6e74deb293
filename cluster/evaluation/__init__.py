"""TODO: what lives in evaluation, in one sentence."""
