"""mIoU and accuracies of label maps, in the conventions of detectron2 and of others by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.mean_iou import ConfusionRecord, MeanIoU, MeanIoUState
from m2f.eval.results.results import columns
from m2f.eval.score.files import read_labels, require_folder, some
from m2f.eval.score.scoring import ScoreReport, Scoring, percent

MAX_CLASSES = 10_000
"""A confusion matrix of more would not fit into memory."""


def semantic_scoring(
    truth: Path, predictions: Path, *, num_classes: int, ignore: int
) -> Scoring[str, ConfusionRecord, MeanIoU]:
    """mIoU over all PNG files under `truth`; predictions have the same relative names.

    Raises EvaluationError for folders without maps and for missing predictions.
    """
    if not 1 <= num_classes <= MAX_CLASSES:
        raise EvaluationError(f"{num_classes} classes; from 1 to {MAX_CLASSES} can be scored")
    names = label_maps(truth, predictions)
    return Scoring(
        jobs=names,
        work=_ScoreImage(truth, predictions, num_classes, ignore),
        state=MeanIoUState(num_classes, ignore),
        report=partial(_report, len(names)),
    )


def label_maps(truth: Path, predictions: Path) -> list[str]:
    """Relative names of the truth's maps, sorted. Raises EvaluationError if a prediction is missing."""
    require_folder(truth, "the label maps of the truth")
    require_folder(predictions, "the predicted label maps")
    names = sorted(path.relative_to(truth).as_posix() for path in truth.rglob("*.png"))
    if not names:
        raise EvaluationError(f"{truth} has no PNG file")
    if missing := [name for name in names if not (predictions / name).is_file()]:
        raise EvaluationError(f"{predictions} lacks {len(missing)} of {len(names)} maps: {some(missing)}")
    return names


@dataclass(frozen=True)
class _ScoreImage:
    truth: Path
    predictions: Path
    num_classes: int
    ignore: int

    def __call__(self, name: str) -> ConfusionRecord:
        state = MeanIoUState(self.num_classes, self.ignore)
        truth, predicted = read_labels(self.truth / name), read_labels(self.predictions / name)
        if truth.shape != predicted.shape:
            raise EvaluationError(f"{name}: the truth has the shape {truth.shape}, the prediction {predicted.shape}")
        try:
            state.update(0, truth, predicted)
        except EvaluationError as error:
            raise EvaluationError(
                f"{name}: {str(error).removeprefix('image 0: ')}; --num-classes counts the labels from 0, and --ignore "
                "is the truth's value for pixels without one"
            ) from error
        return state.record(0)


def _report(num_images: int, result: MeanIoU) -> ScoreReport:
    numbers = {
        "mIoU": result.miou,
        "mIoU_union": result.miou_occurring,
        "mIoU_all_classes": result.miou_all,
        "fwIoU": result.fwiou,
        "mACC": result.macc,
        "pACC": result.pacc,
    }
    per_class = [
        [str(label), percent(iou), pixels]
        for label, (iou, pixels) in enumerate(zip(result.per_class, result.truth_pixels, strict=True))
    ]
    tables = [
        f"{num_images} label maps, in per cent",
        columns(list(numbers), [[percent(value) for value in numbers.values()]]),
        columns(["class", "IoU", "pixels"], per_class),
    ]
    return ScoreReport({**numbers, "IoU": list(result.per_class)}, "\n\n".join(tables))
