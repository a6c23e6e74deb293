"""Backbones. They return feature maps at strides 4, 8, 16 and 32, or the tokens of a plain vision transformer."""
