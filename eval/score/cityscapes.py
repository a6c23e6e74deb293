"""Scoring of results in the file formats of the Cityscapes benchmark.

Truth files are named `*_gtFine_instanceIds.png`. The name of a result starts with the `<city>_<sequence>_<frame>` of
its truth. Both files may be in any subfolder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from m2f.data_pipeline.folders import list_files
from m2f.data_pipeline.readers.cityscapes import CATEGORIES
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.base import percent
from m2f.eval.metrics.cityscapes_ap import (
    CityscapesAP,
    CityscapesAPState,
    CityscapesDetection,
    CityscapesRecord,
    match_cityscapes,
)
from m2f.eval.metrics.cityscapes_iou import (
    NUM_LABELS,
    CityscapesIoU,
    CityscapesIoUState,
    CityscapesPixels,
    count_cityscapes,
)
from m2f.eval.results.results import columns
from m2f.eval.score.files import first_few, read_labels, require_folder
from m2f.eval.score.scoring import OneByOne, ScoreReport, Scoring, score_report

TRUTH_ENDING = "_gtFine_instanceIds.png"


def cityscapes_instance_scoring(
    truth: Path, predictions: Path
) -> Scoring[tuple[Path, Path], CityscapesRecord, CityscapesAP]:
    """Prepare the scoring of instance AP. A result is a text file with lines `MASK LABEL_ID SCORE`.

    Paths of masks are relative to the text file; pixels of an instance are non-zero. Raises EvaluationError for missing
    and ambiguous files.
    """
    pairs = _pairs(truth, predictions, ".txt")
    return Scoring(
        pairs, OneByOne(_ScoreInstances(predictions)), CityscapesAPState(), partial(_report_instances, len(pairs))
    )


def cityscapes_semantic_scoring(
    truth: Path, predictions: Path
) -> Scoring[tuple[Path, Path], CityscapesPixels, CityscapesIoU]:
    """Prepare the scoring of IoU and iIoU of classes and categories. A result is a PNG of label ids (not train ids).

    Raises EvaluationError for missing and ambiguous files.
    """
    pairs = _pairs(truth, predictions, ".png")
    return Scoring(pairs, OneByOne(_score_semantic), CityscapesIoUState(), partial(_report_semantic, len(pairs)))


def _pairs(truth: Path, predictions: Path, ending: str) -> list[tuple[Path, Path]]:
    """Return the paths of truth and result of every image, sorted by the path of the truth."""
    require_folder(truth, "gtFine")
    require_folder(predictions, f"the results, as {ending} files")
    maps = [path for path in list_files(truth) if path.name.endswith(TRUTH_ENDING)]
    if not maps:
        raise EvaluationError(f"{truth} contains no file named *{TRUTH_ENDING}")
    by_frame: dict[str, list[Path]] = {}
    for path in list_files(predictions):
        if path.name.endswith(ending):
            by_frame.setdefault("_".join(path.stem.split("_")[:3]), []).append(path)
    frames = [path.name.removesuffix(TRUTH_ENDING) for path in maps]
    if missing := [frame for frame in frames if frame not in by_frame]:
        raise EvaluationError(
            f"{predictions} has no result for {len(missing)} of {len(maps)} images: {first_few(missing)}; "
            f"the expected name is <city>_<sequence>_<frame>*{ending}"
        )
    for frame in frames:
        if len(by_frame[frame]) > 1:
            raise EvaluationError(f"{frame} has several results: {first_few(by_frame[frame])}; keep only one")
    return [(path, by_frame[frame][0]) for path, frame in zip(maps, frames, strict=True)]


@dataclass(frozen=True)
class _ScoreInstances:
    """Matches the detections of one image with the truth."""

    root: Path
    """Folder of the results. Masks outside it are refused."""

    def __call__(self, pair: tuple[Path, Path]) -> CityscapesRecord:
        truth, result = pair
        try:
            return match_cityscapes(read_labels(truth), self._detections(result))
        except EvaluationError:
            raise
        except ValueError as error:
            raise EvaluationError(f"{result}: {error}") from error

    def _detections(self, result: Path) -> Iterator[CityscapesDetection]:
        """Yield detections one at a time. If several lines name one mask, the last one counts, as in the benchmark."""
        by_mask = {}
        for number, line in enumerate(result.read_text().splitlines(), start=1):
            mask, label, score = _parse(line, f"{result}, line {number}")
            path = (result.parent / mask).resolve()
            if not path.is_relative_to(self.root.resolve()):
                raise EvaluationError(f"{result}, line {number}: the mask {mask} is outside {self.root}")
            by_mask[path] = (label, score)
        for path, (label, score) in by_mask.items():
            yield CityscapesDetection(read_labels(path) != 0, label, score)


def _parse(line: str, where: str) -> tuple[str, int, float]:
    """Parse a line `MASK LABEL_ID SCORE`. Raises EvaluationError with a message that starts with `where`."""
    try:
        mask, label, score = line.split()
        parsed = mask, int(float(label)), float(score)
    except (ValueError, OverflowError):  # an infinite label overflows
        raise EvaluationError(f"{where}: {line[:80]!r} is not `MASK LABEL_ID SCORE`") from None
    if not -1 <= parsed[1] < NUM_LABELS or not math.isfinite(parsed[2]):
        raise EvaluationError(f"{where}: {line[:80]!r} needs a label id of Cityscapes and a finite score")
    return parsed


def _score_semantic(pair: tuple[Path, Path]) -> CityscapesPixels:
    truth, result = pair
    try:
        return count_cityscapes(read_labels(truth), read_labels(result))
    except EvaluationError:
        raise
    except ValueError as error:
        raise EvaluationError(f"{result}: {error}") from error


def _report_instances(num_images: int, result: CityscapesAP) -> ScoreReport:
    per_class = {str(k): v and {"AP": v[0], "AP50": v[1]} for k, v in result.per_class.items()}
    scores: dict[str, tuple[float | None, float | None]] = {
        CATEGORIES.by_id[k].name: class_scores or (None, None) for k, class_scores in result.per_class.items()
    }
    scores["all"] = (result.ap, result.ap50)
    table = columns(
        ["class", "AP", "AP50"], [[name, percent(ap), percent(ap50)] for name, (ap, ap50) in scores.items()]
    )
    content = {"AP": result.ap, "AP50": result.ap50, "per_class": per_class}
    return score_report(content, f"{num_images} images, in per cent", num_images, (), [table])


def _report_semantic(num_images: int, result: CityscapesIoU) -> ScoreReport:
    classes = {k: (iou, result.per_class_iiou.get(k)) for k, iou in result.per_class.items()}
    groups = {name: (iou, result.per_group_iiou.get(name)) for name, iou in result.per_group.items()}
    content = {
        "IoU": result.iou,
        "iIoU": result.iiou,
        "IoU_categories": result.group_iou,
        "iIoU_categories": result.group_iiou,
        "per_class": {str(k): {"IoU": iou, "iIoU": iiou} for k, (iou, iiou) in classes.items()},
        "per_category": {name: {"IoU": iou, "iIoU": iiou} for name, (iou, iiou) in groups.items()},
    }
    named = {CATEGORIES.by_id[k].name: scores for k, scores in classes.items()}
    tables = [
        columns([level, "IoU", "iIoU"], [[name, percent(iou), percent(iiou)] for name, (iou, iiou) in rows.items()])
        for level, rows in (
            ("class", named | {"all": (result.iou, result.iiou)}),
            ("category", groups | {"all": (result.group_iou, result.group_iiou)}),
        )
    ]
    return score_report(content, f"{num_images} images, in per cent", num_images, (), tables)
