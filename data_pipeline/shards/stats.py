"""Class statistics of a data set, computed from its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m2f.data_pipeline.shards.manifest import Manifest
from m2f.model.format_count import format_count


@dataclass(frozen=True, slots=True)
class ClassRow:
    """Statistics of one category, without crowds."""

    name: str
    is_thing: bool
    num_images: int
    """Number of images with the category."""
    image_share: float
    """Share of all images, 0 to 1."""
    num_segments: int
    pixel_share: float
    """Share of the pixels of all images, 0 to 1. Overlapping instances are each counted in full. See `pixels_note`."""


def pixels_note(manifest: Manifest) -> str | None:
    """Return a note for manifests without counted pixels; None for others."""
    if manifest.category_pixels is not None:
        return None
    return (
        "pixels are the areas stated by the source, because this old manifest has no pixel counts; write it again to "
        "count them (m2f shard --redo, or m2f index)"
    )


def class_table(manifest: Manifest) -> tuple[ClassRow, ...]:
    """Return one row per category, in the order of the category table."""
    pixels = int(np.dot(manifest.height.astype(np.int64), manifest.width.astype(np.int64)))
    return tuple(
        ClassRow(
            name=entry.category.name,
            is_thing=entry.category.is_thing,
            num_images=entry.num_images,
            image_share=entry.num_images / manifest.num_samples,
            num_segments=entry.num_segments,
            pixel_share=entry.num_pixels / pixels,
        )
        for entry in manifest.statistics()
    )


def format_class_table(rows: Sequence[ClassRow]) -> str:
    """Return the rows as aligned text with a line of totals."""
    header = ("class", "kind", "images", "% images", "segments", "% pixels")
    body = [
        (
            row.name,
            "thing" if row.is_thing else "stuff",
            f"{row.num_images:,}",
            f"{100 * row.image_share:.2f}",
            f"{row.num_segments:,}",
            f"{100 * row.pixel_share:.2f}",
        )
        for row in rows
    ]
    segments, pixels = sum(row.num_segments for row in rows), sum(row.pixel_share for row in rows)
    body.append(
        (f"total of {format_count(len(rows), 'class', 'classes')}", "", "", "", f"{segments:,}", f"{100 * pixels:.2f}")
    )
    widths = [max(len(line[column]) for line in (header, *body)) for column in range(len(header))]
    return "\n".join(_aligned(line, widths) for line in (header, *body))


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Join the cells of a line: the first two are left-aligned, the numbers after them right-aligned."""
    words = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join(words + numbers)
