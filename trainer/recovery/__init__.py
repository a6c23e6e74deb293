"""TODO: what lives in recovery, in one sentence."""
