"""TODO: what lives in telemetry, in one sentence."""
