"""Adapter to hotcoco, limited to functions whose results equal those of the reference, on validated input.

hotcoco does not validate its input: it follows paths out of the folder, divides by areas of 0 and accepts a flag of 2.
So callers check paths, flags, numbers and areas, and pass segments as types of this package. hotcoco gets classes as
0, 1, 2, ... and never the image ids of files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hotcoco.panoptic import PanopticEval
from hotcoco.primitives import mask_iou

from m2f.eval.metrics.panoptic_quality import PanopticRecord, TruthSegment
from m2f.eval.metrics.rle import Rle

_IMAGE = 1
"""Image id passed to hotcoco. Every image is evaluated alone, so they can share one id."""


class EngineRefusedError(ValueError):
    """hotcoco cannot match files or tables. The message names neither the files nor settings of this package."""


@dataclass(frozen=True)
class PanopticPair:
    """Two RGB maps of segment ids, with the meaning of the ids."""

    truth_map: Path
    segments: Mapping[int, TruthSegment]
    """Annotated segments by id, in the order of the annotation."""
    predicted_map: Path
    labels: Mapping[int, int]
    """Contiguous class index of each predicted segment id."""


def pairwise_ious(detected: Sequence[Rle], annotated: Sequence[Rle], is_crowd: Sequence[bool]) -> np.ndarray:
    """Return the IoU [D, G] float64 of masks of one size, bit-identical to pycocotools.

    Each side needs at least one mask. For crowds, the value is the intersection divided by the detection's area.
    """
    return mask_iou(detected, annotated, is_crowd)


def match_panoptic_files(pair: PanopticPair) -> PanopticRecord:
    """Match one image directly from its files, which must be PNGs of 8-bit RGB.

    hotcoco returns only sums per class. So all matches of a class get the mean of their IoUs, and no row has an area.
    Raises EngineRefusedError for files and tables that do not match each other, and for areas that are not integers.
    """
    truth = [
        {"id": i, "category_id": s.label, "area": int(s.area), "iscrowd": int(s.is_crowd)}
        for i, s in pair.segments.items()
    ]
    if any(s.area != entry["area"] for s, entry in zip(pair.segments.values(), truth, strict=True)):
        raise EngineRefusedError("an area is not an integer")
    predicted = [{"id": i, "category_id": label, "area": 0, "iscrowd": 0} for i, label in pair.labels.items()]
    categories = sorted({s.label for s in pair.segments.values()}.union(pair.labels.values()))
    names = {"truth": pair.truth_map.name, "predicted": pair.predicted_map.name}
    try:
        evaluation = PanopticEval(
            {
                "images": [{"id": _IMAGE, "file_name": names["truth"], "height": 1, "width": 1}],
                "annotations": [{"image_id": _IMAGE, "file_name": names["truth"], "segments_info": truth}],
                "categories": [{"id": label, "name": str(label), "isthing": 1} for label in categories],
            },
            {"annotations": [{"image_id": _IMAGE, "file_name": names["predicted"], "segments_info": predicted}]},
            gt_folder=pair.truth_map.parent,
            pred_folder=pair.predicted_map.parent,
        )
        evaluation.evaluate()
    except (ValueError, OSError) as error:
        raise EngineRefusedError(str(error)) from error
    per_class = evaluation.results()["per_class"]
    return _record({label: per_class[label] for label in categories})


def _record(per_class: Mapping[int, Mapping[str, Any]]) -> PanopticRecord:
    """Build the record of one image from its sums by class, in ascending order of class."""
    labels = list(per_class)
    sums = per_class.values()
    matches = [counts["tp"] for counts in sums]
    means = [counts["iou"] / counts["tp"] if counts["tp"] else 0.0 for counts in sums]
    return PanopticRecord(
        matched_label=np.repeat(labels, matches),
        matched_iou=np.repeat(means, matches),
        false_positive=np.repeat(labels, [counts["fp"] for counts in sums]),
        false_negative=np.repeat(labels, [counts["fn"] for counts in sums]),
    )
