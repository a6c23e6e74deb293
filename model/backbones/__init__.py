"""Backbones that return feature maps of strides 4, 8, 16 and 32."""
