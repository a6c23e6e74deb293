"""Survey of data sets: classes, sizes, objects and faults, counted from the sources."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.partition import UnknownValueError
from m2f.data_pipeline.readers import Reader
from m2f.data_pipeline.readers.unusable import UnusableAnnotation
from m2f.model.format_count import format_count

_NUM_SURVEYED = 500
"""Largest number of images that are read per source. More take longer, and change medians and shares little."""
_MAX_FAULTS_SHOWN = 10
"""Number of faults that are listed. The kinds of all faults are counted."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Statistics of all data sets together, from at most 500 evenly spaced images of each.

    Missing files and errors in annotation files are found for all images.
    """

    num_images: int
    num_read: int
    """Number of images that were read."""
    class_counts: tuple[tuple[str, int], ...]
    """Number of segments of every class, in class order."""
    long_side: int
    """Median of the longer sides of the images, in pixels."""
    max_objects_per_image: int
    """Largest number of segments in one image."""
    median_object_share: float
    """Median share of the image area that a segment covers, from 0 to 1."""
    largest_megapixels: float
    """Size of the largest image, in 10^6 pixels."""
    num_crowds: int
    """Number of segments that are crowds: groups of objects that are not separated."""
    faults: tuple[str, ...]
    """Messages about images and annotations that cannot be used."""
    num_empty: int = 0
    """Number of images without a segment."""
    num_unknown: int = 0
    """Number of images whose maps have values without a class."""
    is_sampled: bool = False
    """Whether only a part of the images was read, because a data set has more than 500."""
    repairs: tuple[tuple[str, int], ...] = ()
    """Descriptions of repaired or doubtful images and annotations that are used, with their counts."""

    def lines(self) -> list[str]:
        """Return text lines with the statistics, the repairs, the faults counted by kind, and the first ten faults."""
        classes = ", ".join(f"{name} {count}" for name, count in self.class_counts[:12])
        more = f" and {len(self.class_counts) - 12} more" if len(self.class_counts) > 12 else ""
        lines = [
            f"{format_count(self.num_images, 'image')} ({self.num_read} read), median longer side {self.long_side} "
            f"pixels; at most {format_count(self.max_objects_per_image, 'segment')} per image; the median segment "
            f"covers {self.median_object_share:.2%}",
            f"segments by class{self._scope()}: {classes}{more}",
        ]
        if self.num_empty:
            lines.append(
                f"{self.num_empty} of {format_count(self.num_read, 'image')} without a segment: training leaves them "
                "out (data.skip_images_without_targets), and evaluation counts every detection in them as wrong; "
                "remove images that are not annotated yet"
            )
        lines += [f"{count} {repair}{self._scope()}" for repair, count in self.repairs]
        if self.faults:
            kinds = Counter(fault_kind(fault) for fault in self.faults)
            more = "; the images that were not read may have more" if self.is_sampled else ""
            lines.append(f"{format_count(len(self.faults), 'fault')}{more}:")
            lines += [f"  {count} x {kind}" for kind, count in kinds.most_common()]
            lines += ["first faults:", *(f"  {fault}" for fault in self.faults[:_MAX_FAULTS_SHOWN])]
        return lines

    def _scope(self) -> str:
        """Return the images that a count refers to, as an addition to the count; empty if they are all images."""
        return f" in the {format_count(self.num_read, 'image')} read" if self.is_sampled else ""


def fault_kind(message: str) -> str:
    """Return the kind of a fault: its message without paths, quoted names and numbers, at most 120 characters."""
    text = re.sub(r"^[^:]*/[^:]*: ", "", message)  # a path, which may have spaces
    text = re.sub(r"\([^()]*/[^()]*\)|\S*/\S*?(: |$|\s)", "", text)
    return re.sub(r"\d+(\.\d+)?", "N", re.sub(r"'[^']*'", "'...'", text)).strip()[:120]


def survey(opened: Sequence[tuple[Reader, tuple[UnusableAnnotation, ...]]]) -> Survey:
    """Survey data sets, given the results of `open_dataset`. Raises DataError if no image can be read."""
    faults: list[str] = []
    counts: Counter[str] = Counter()
    repairs: Counter[str] = Counter()
    long_sides, shares, per_image, areas = [], [], [0], [0]
    num_images = num_crowds = num_unknown = num_empty = 0
    is_sampled = False
    for reader, unusable in opened:
        faults += [f"{entry.source}: {entry.message}" for entry in unusable]
        names = {category.id: category.name for category in reader.categories.categories}
        counts.update(dict.fromkeys(names.values(), 0))
        total = len(reader.keys)
        num_images += total
        step = max(1, -(-total // _NUM_SURVEYED))
        is_sampled |= step > 1
        for index in range(total):
            if index % step and all(path.is_file() for path in reader.files(index)):
                continue
            try:
                sample = reader.read(index)
            except DataError as error:
                faults.append(str(error))
                num_unknown += isinstance(error, UnknownValueError)
                continue
            faults += sample.left_out
            repairs.update(sample.repairs)
            pixels = sample.height * sample.width
            maps = {segment.map for segment in sample.annotation.segments}
            segments = [s for s in sample.annotation.segments if s.map == ("inst" if "inst" in maps else "seg")]
            # If a sample has instances, the things of its map are the same objects and must not be counted twice.
            counts.update(
                names[s.category_id]
                for s in sample.annotation.segments
                if s.map == "inst" or "inst" not in maps or not s.is_thing
            )
            num_empty += not segments
            num_crowds += sum(segment.is_crowd for segment in segments)
            long_sides.append(max(sample.height, sample.width))
            areas.append(pixels)
            per_image.append(len(segments))
            shares += [segment.area / pixels for segment in segments]
    if not long_sides:
        listed = "\n".join(f"  {fault}" for fault in faults[:_MAX_FAULTS_SHOWN])
        raise DataError(f"none of {format_count(num_images, 'image')} can be read:\n{listed}")
    return Survey(
        num_images=num_images,
        num_read=len(long_sides),
        class_counts=tuple(counts.items()),
        long_side=round(median(long_sides)),
        max_objects_per_image=max(per_image),
        median_object_share=median(shares) if shares else 0.0,
        largest_megapixels=max(areas) / 1e6,
        num_crowds=num_crowds,
        num_unknown=num_unknown,
        num_empty=num_empty,
        is_sampled=is_sampled,
        faults=tuple(dict.fromkeys(faults)),  # the training and validation parts of one source report the same faults
        repairs=tuple(sorted(repairs.items())),
    )
