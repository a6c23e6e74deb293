"""Backbones that return feature maps at strides 4, 8, 16 and 32."""
