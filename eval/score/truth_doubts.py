"""Doubts about truth whose areas, ids and maps contradict each other. The official code accepts such truth silently.

Reading every map again would double the time of `m2f score panoptic`, so files are checked on a sample of images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import TypeVar

from m2f.data_pipeline.readers.masks import AREA_MISMATCH, NO_PIXELS, area_mismatches
from m2f.data_pipeline.sample import VOID_ID
from m2f.eval.metrics.instance_matching import InstanceTruth
from m2f.eval.metrics.overlaps import count_overlaps
from m2f.eval.metrics.panoptic_quality import ClassQuality, PanopticTruth
from m2f.eval.metrics.rle import mask_areas
from m2f.eval.score.files import first_few
from m2f.model.format_count import format_count

SAMPLE = 8
"""Largest number of images whose truth is checked."""
MIN_SHARE = 0.1
"""Share of segments with doubtful areas above which they are reported. Hidden parts of objects can explain a few."""
ImageT = TypeVar("ImageT")


@dataclass(frozen=True)
class TruthDoubts:
    """Numbers of annotated segments and of doubts about them."""

    images: int = 0
    segments: int = 0
    wrong_areas: int = 0
    """Segments with fewer than half or more than twice the pixels of their stated area."""
    without_pixels: int = 0
    unlisted: int = 0
    """Ids in maps that no segment has."""

    def __add__(self, other: TruthDoubts) -> TruthDoubts:
        return TruthDoubts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def describe(self, effect: str) -> list[str]:
        """Return a line for every kind of doubt; `effect` states what depends on the stated areas."""
        lines = []
        if self.wrong_areas > MIN_SHARE * self.segments:
            lines.append(
                f"{self.wrong_areas} of {self.segments} annotated segments have less than half or more than twice the "
                f"pixels of their stated area; perhaps images were rescaled, or areas are shares of the image; {effect}"
            )
        if self.without_pixels:
            lines.append(
                f"{self.without_pixels} of {self.segments} annotated segments have no pixel; perhaps coordinates "
                "are normalised, or the map is of another version"
            )
        if self.unlisted:
            lines.append(
                f"no annotated segment has {format_count(self.unlisted, 'id')} of the truth's maps; their pixels are "
                "background"
            )
        return [f"DOUBTFUL TRUTH ({format_count(self.images, 'image')} checked): {line}" for line in lines]


def describe_high_quality(names: Sequence[str], per_class: Sequence[ClassQuality]) -> list[str]:
    """Return a line about classes with an SQ above 1, up to rounding; else no line."""
    high = [name for name, quality in zip(names, per_class, strict=True) if quality.sq > 1 + 1e-9]
    if not high:
        return []
    return [f"DOUBTFUL TRUTH: SQ is above 100 % ({first_few(high)}); stated areas are smaller than the segments"]


def sampled(images: Sequence[ImageT]) -> Sequence[ImageT]:
    """Return at most SAMPLE evenly spaced images."""
    return images[:: max(1, math.ceil(len(images) / SAMPLE))]


def panoptic_doubts(truth: PanopticTruth) -> TruthDoubts:
    """Count the doubts about one image. Stated areas of crowds affect nothing, so they are not compared."""
    pixels = count_overlaps(truth.id_map, truth.id_map).truth_area
    segments = {i: segment for i, segment in truth.segments.items() if i != VOID_ID}
    pairs = ((pixels.get(i, 0) if s.is_crowd else s.area, pixels.get(i, 0)) for i, s in segments.items())
    return _count(pairs, unlisted=len(pixels.keys() - segments.keys() - {VOID_ID}))


def instance_doubts(truth: InstanceTruth) -> TruthDoubts:
    """Count the doubts about one image. Stated areas of crowds are not compared."""
    areas = zip(truth.areas.tolist(), mask_areas(truth.masks).tolist(), truth.is_crowd.tolist(), strict=True)
    return _count((area, pixels) for area, pixels, is_crowd in areas if not is_crowd)


def _count(areas: Iterable[tuple[float, int]], unlisted: int = 0) -> TruthDoubts:
    """Count the doubts about one image, given pairs of stated area and number of pixels."""
    pairs = list(areas)
    found = area_mismatches(pairs)
    return TruthDoubts(1, len(pairs), found.count(AREA_MISMATCH), found.count(NO_PIXELS), unlisted)
