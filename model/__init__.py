"""Mask2Former and related models: backbones, decoders, losses, post-processing, weights, export and analysis."""
