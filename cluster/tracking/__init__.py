"""TODO: what lives in tracking, in one sentence."""
