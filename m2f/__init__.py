"""Mask2Former-class segmentation at scale: the folders beside this one, under the name that Python knows."""

from pathlib import Path

HOME = Path(__file__).parent
"""The folder that holds model/, data_pipeline/, trainer/, eval/, cluster/ and configs/."""

if not (HOME / "model").is_dir():  # a checkout without symbolic links has text files in their place
    HOME = HOME.parent
    __path__.append(str(HOME))
