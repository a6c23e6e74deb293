"""TODO: what lives in transformer_decoder, in one sentence."""
