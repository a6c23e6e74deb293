"""TODO: what lives in deform_attn, in one sentence."""
