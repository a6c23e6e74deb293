"""TODO: what lives in report, in one sentence."""
