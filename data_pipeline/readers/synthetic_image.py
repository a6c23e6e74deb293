"""Images of the synthetic data set: stuff regions, objects that hide parts of each other, and small objects on top."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

from m2f.data_pipeline.readers.shapes import SHAPES, TEXTURES, shape_coverage, texture
from m2f.data_pipeline.sources import SyntheticSource

_SIDE = (128, 192)
"""Smallest and largest height and width in pixels, small enough to train on a CPU in minutes."""
_OBJECTS = (4, 12)
"""Smallest and largest number of objects. Some of them may not find a place."""
_REGIONS = (1, 3)
"""Smallest and largest number of stuff regions."""
_LARGE_DIAMETERS = (30.0, 60.0)
"""Smallest and largest diameter in pixels of objects that are not small."""
_TILT = 0.15
"""Largest rotation of shapes in radians: enough to vary, and little enough to learn in minutes."""
_OVERLAP_SHARE = 0.7
"""Probability that a place tried for a large object lies across the edge of an earlier object."""
_MIN_VISIBLE = 0.4
"""Smallest visible share of the pixels of each object."""
_MAX_TRIES = 30
"""Number of places that are tried for an object before it is left out."""
_MIN_CONTRAST = 110.0
"""Smallest Euclidean RGB distance between the colour of an object and the mean colour of the pixels it covers."""
_TEXTURE_TONES = ((20.0, 60.0), (45.0, 80.0))
"""Range of the brightness of a texture's darker tone, and range of the difference to its brighter tone."""
_TINT = 20.0
"""Largest deviation of the channels of a tone from grey."""
_RIM = 0.2
"""Brightness of an object's rim as a share of the brightness of its fill."""
_NOISE = 3.0
"""Standard deviation of the noise in grey levels."""


@dataclass(frozen=True)
class SyntheticImage:
    """A generated image with its ground truth. Each pixel belongs to a segment; segment i has local id i + 1."""

    image: np.ndarray
    """[H, W, 3] uint8 RGB."""
    seg: np.ndarray
    """[H, W] uint8 local ids."""
    names: tuple[str, ...]
    """Shape or texture of each segment."""
    hidden: tuple[float, ...]
    """Share of each object's pixels that later objects hide; 0 for stuff."""
    diameters: tuple[float, ...]
    """Diameter of each object in pixels as drawn at random; 0 for stuff."""


@dataclass
class _Canvas:
    """An image under construction."""

    image: np.ndarray
    """[H, W, 3] float32 RGB."""
    seg: np.ndarray
    """[H, W] uint8 ids from 1."""
    names: list[str]
    full_areas: list[int]
    """Pixels of each object before later objects hide some of them; 0 for stuff."""
    diameters: list[float]
    centers: list[tuple[float, float]] = field(default_factory=list)
    """x and y of the objects so far."""


def draw_image(
    seed: int,
    index: int,
    small_share: float = SyntheticSource.small_share,
    small_diameters: tuple[float, float] = SyntheticSource.small_diameters,
) -> SyntheticImage:
    """Generate one image, a pure function of the arguments. The last two are settings of SyntheticSource."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    canvas = _draw_background(random)
    count = int(random.integers(_OBJECTS[0], _OBJECTS[1] + 1))
    num_small = int(random.binomial(count, small_share))
    for _ in range(count - num_small):
        _add_object(canvas, random.uniform(*_LARGE_DIAMETERS), random)
    for _ in range(num_small):  # last, so that they are not hidden
        _add_object(canvas, random.uniform(*small_diameters), random)
    return _finish(canvas, random)


def _draw_background(random: np.random.Generator) -> _Canvas:
    """Return a canvas with regions around random points, each with a different texture in two greyish tones.

    Objects are brighter and colourful, so a model learns from few images what an object is. Only the outline of an
    object shows its class.
    """
    height, width = (int(side) for side in random.integers(_SIDE[0], _SIDE[1] + 1, size=2))
    names = [str(n) for n in random.permutation(TEXTURES)[: random.integers(_REGIONS[0], _REGIONS[1] + 1)]]
    y, x = np.mgrid[:height, :width]
    sites = random.random((len(names), 2)) * (height, width)
    region = np.argmin([np.hypot(y - sy, x - sx) for sy, sx in sites], axis=0)
    image = np.empty((height, width, 3), np.float32)
    for number, name in enumerate(names):
        first = random.uniform(*_TEXTURE_TONES[0]) + random.uniform(-_TINT, _TINT, 3)
        second = first + random.uniform(*_TEXTURE_TONES[1]) + random.uniform(-_TINT, _TINT, 3)
        pattern = texture(name, height, width, random)[..., None]
        inside = region == number
        image[inside] = (first + pattern * (second - first))[inside]
    zeros = [0] * len(names)
    return _Canvas(image, (region + 1).astype(np.uint8), names, zeros, [0.0] * len(names))


def _add_object(canvas: _Canvas, diameter: float, random: np.random.Generator) -> None:
    """Add a random shape at a place where it hides no earlier object too much. If none is found, add nothing."""
    name = str(random.choice(SHAPES))
    coverage = shape_coverage(name, diameter, random.uniform(-_TILT, _TILT))
    size = len(coverage)
    for _ in range(_MAX_TRIES):
        x, y = _propose_center(canvas, diameter, random)
        left, top = round(x - size / 2), round(y - size / 2)
        if left < 0 or top < 0 or left + size > canvas.seg.shape[1] or top + size > canvas.seg.shape[0]:
            continue
        window = (slice(top, top + size), slice(left, left + size))
        mask = coverage > 0.5
        if not _hides_too_much(canvas, window, mask):
            break
    else:
        return
    _paint(canvas.image[window], coverage, random)
    canvas.seg[window][mask] = len(canvas.names) + 1
    canvas.names.append(name)
    canvas.full_areas.append(int(mask.sum()))
    canvas.diameters.append(diameter)
    canvas.centers.append((x, y))


def _propose_center(canvas: _Canvas, diameter: float, random: np.random.Generator) -> tuple[float, float]:
    """Return a random x and y; for a large object with probability 70 %, across the edge of an earlier object."""
    height, width = canvas.seg.shape
    if not canvas.centers or diameter < _LARGE_DIAMETERS[0] or random.random() > _OVERLAP_SHARE:
        return random.uniform(0, width), random.uniform(0, height)
    other = int(random.integers(len(canvas.centers)))
    x, y = canvas.centers[other]
    other_diameter = canvas.diameters[len(canvas.names) - len(canvas.centers) + other]
    distance = random.uniform(0.5, 0.8) * (diameter + other_diameter) / 2
    angle = random.uniform(0, 2 * np.pi)
    return x + distance * np.cos(angle), y + distance * np.sin(angle)


def _hides_too_much(canvas: _Canvas, window: tuple[slice, slice], mask: np.ndarray) -> bool:
    num_ids = len(canvas.names) + 1
    visible = np.bincount(canvas.seg.ravel(), minlength=num_ids)[1:]
    covered = np.bincount(canvas.seg[window][mask], minlength=num_ids)[1:]
    full = np.array(canvas.full_areas)
    small = (np.array(canvas.diameters) < _LARGE_DIAMETERS[0]) & (full > 0)
    return bool(((visible - covered < _MIN_VISIBLE * full) | (small & (covered > 0))).any())


def _paint(image: np.ndarray, coverage: np.ndarray, random: np.random.Generator) -> None:
    """Blend a soft two-colour gradient with a thin dark rim onto a window [S, S, 3] of the image."""
    background = image[coverage > 0.5].mean(axis=0)
    first = _contrasting_color(background, _MIN_CONTRAST, random)
    second = np.clip(first + random.uniform(-45, 45, 3), 0, 255)
    ramp = np.linspace(0, 1, len(image), dtype=np.float32)[:, None, None]
    fill = first + ramp * (second - first)
    inner = cv2.erode(coverage, np.ones((3, 3), np.uint8))[..., None]
    colors = fill * (_RIM + (1 - _RIM) * inner)
    image += coverage[..., None] * (colors - image)


def _contrasting_color(color: np.ndarray, distance: float, random: np.random.Generator) -> np.ndarray:
    """Return a random bright colour with at least this RGB distance from another colour."""
    while True:
        candidate = random.permutation([random.uniform(60, 120), random.uniform(60, 255), random.uniform(220, 255)])
        if np.linalg.norm(candidate - color) >= distance:
            return candidate


def _finish(canvas: _Canvas, random: np.random.Generator) -> SyntheticImage:
    """Add noise, remove stuff that objects cover completely, and return the image."""
    noisy = canvas.image + _NOISE * random.standard_normal(canvas.image.shape, np.float32)
    areas = np.bincount(canvas.seg.ravel(), minlength=len(canvas.names) + 1)[1:]
    kept = np.flatnonzero(areas)
    renumber = np.zeros(len(canvas.names) + 1, np.uint8)
    renumber[kept + 1] = np.arange(1, len(kept) + 1)
    full = np.maximum(canvas.full_areas, areas)
    hidden = np.where(np.array(canvas.full_areas) > 0, 1 - areas / np.maximum(full, 1), 0.0)
    return SyntheticImage(
        image=noisy.clip(0, 255).astype(np.uint8),
        seg=renumber[canvas.seg],
        names=tuple(canvas.names[i] for i in kept),
        hidden=tuple(float(hidden[i]) for i in kept),
        diameters=tuple(canvas.diameters[i] for i in kept),
    )
