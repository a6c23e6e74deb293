"""Mask2Former-class segmentation at scale: the folders beside this one, under the name that Python knows."""
