"""mIoU and accuracies of label maps. `mIoU` follows detectron2; `MeanIoU` documents the two other conventions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.folders import list_files
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.mean_iou import (
    BINARY_MASK,
    ConfusionRecord,
    MeanIoU,
    MeanIoUState,
    ignore_label,
    is_binary_mask,
)
from m2f.eval.results.results import EvaluationResults, EvaluationSubject, columns
from m2f.eval.score.files import ScoredCategory, first_few, read_labels, require_folder
from m2f.eval.score.options import (
    EVERYTHING,
    ScoreOptions,
    category_table,
    chosen_images,
    chosen_labels,
    scope_notes,
    score_subject,
)
from m2f.eval.score.scoring import OneByOne, ScoreReport, Scoring, percent, score_report

MAX_CLASSES = 10_000
"""A larger confusion matrix would not fit into memory."""


def semantic_scoring(
    truth: Path,
    predictions: Path,
    *,
    num_classes: int,
    ignore: int | None = None,
    void: int | None = None,
    class_names: tuple[str, ...] | None = None,
    options: ScoreOptions = EVERYTHING,
) -> Scoring[str, ConfusionRecord, MeanIoU]:
    """Prepare the scoring of mIoU over all PNG files under `truth`; predictions have the same relative names.

    `ignore` is the value of truth pixels without a label, and `void` that of predicted pixels without a class; None:
    255, or 65535 for 256 or more classes. `class_names` holds the name of every class; None: their numbers.
    Raises EvaluationError for folders without maps, for missing predictions, and for truth of only 0 and 255 if
    `ignore` is None.
    """
    if not 1 <= num_classes <= MAX_CLASSES:
        raise EvaluationError(f"the number of classes is {num_classes}; it must be from 1 to {MAX_CLASSES}")
    if class_names is not None and len(class_names) != num_classes:
        raise EvaluationError(f"there are {len(class_names)} names for {num_classes} classes; list one name per class")
    shown = tuple(map(str, range(num_classes))) if class_names is None else class_names
    categories = tuple(ScoredCategory(label, name, False) for label, name in enumerate(shown))
    chosen = chosen_labels(categories, options, "the table of classes")
    names = label_maps(truth, predictions)
    selected = chosen_images((n for name in names for n in (name, name.removesuffix(".png"))), options, str(truth))
    names = [name for name in names if selected is None or name in selected or name.removesuffix(".png") in selected]
    if ignore is None and is_binary_mask(_label_values(truth, names), ignore, num_classes):
        raise EvaluationError(f"the label maps in {truth} have {BINARY_MASK} (`m2f score`: --ignore 255)")
    state = MeanIoUState(num_classes, ignore, ignore_label(num_classes) if void is None else void)
    subject = score_subject(predictions, options, len(names))
    return Scoring(
        tasks=names,
        work=OneByOne(_ScoreImage(truth, predictions, num_classes, state.ignore, state.void)),
        state=state,
        report=partial(_report, shown, chosen, scope_notes(options, len(names)), state, len(names)),
        results=partial(_results, category_table(categories), subject, chosen, state, len(names)),
        names=names,
        classes=chosen,
    )


def _results(
    table: CategoryTable,
    subject: EvaluationSubject,
    chosen: Collection[int] | None,
    state: MeanIoUState,
    num_images: int,
    result: MeanIoU,
) -> EvaluationResults:
    """Return the results for a page and for Python."""
    return EvaluationResults(
        subject=subject,
        categories=table,
        num_images=num_images,
        panoptic=None,
        instance=None,
        semantic=state.compute_for_classes(chosen),
        pixels=state.confusion() if chosen is None else None,
        notes=_void_notes(state),
    )


def label_maps(truth: Path, predictions: Path) -> list[str]:
    """Return the sorted relative names of the truth's maps. Raises EvaluationError if a prediction is missing."""
    require_folder(truth, "the label maps of the truth")
    require_folder(predictions, "the predicted label maps")
    names = sorted(path.relative_to(truth).as_posix() for path in list_files(truth) if path.suffix == ".png")
    if not names:
        raise EvaluationError(f"{truth} contains no PNG files")
    if missing := [name for name in names if not (predictions / name).is_file()]:
        raise EvaluationError(
            f"{predictions} does not contain {len(missing)} of {len(names)} maps: {first_few(missing)}"
        )
    return names


def _label_values(truth: Path, names: Sequence[str]) -> set[int]:
    """Return the values in the maps, up to the first map that has other values than 0 and 255: usually the first."""
    values: set[int] = set()
    for name in names:
        if not values <= {0, 255}:
            break
        values.update(np.unique(read_labels(truth / name)).tolist())
    return values


@dataclass(frozen=True)
class _ScoreImage:
    """Counts the pixels of one pair of label maps."""

    truth: Path
    predictions: Path
    num_classes: int
    ignore: int
    void: int | None

    def __call__(self, name: str) -> ConfusionRecord:
        state = MeanIoUState(self.num_classes, self.ignore, self.void)
        truth, predicted = read_labels(self.truth / name), read_labels(self.predictions / name)
        if truth.shape != predicted.shape:
            raise EvaluationError(
                f"{name}: the truth has shape {truth.shape}, but the prediction has {predicted.shape}"
            )
        try:
            state.update(0, truth, predicted)
        except EvaluationError as error:
            raise EvaluationError(
                f"{name}: {str(error).removeprefix('image 0: ')}; labels must be below --num-classes, and --ignore "
                "is the value of unlabelled pixels in the truth"
            ) from error
        return state.record(0)


def _report(
    names: Sequence[str],
    chosen: Collection[int] | None,
    notes: Sequence[str],
    state: MeanIoUState,
    num_images: int,
    result: MeanIoU,
) -> ScoreReport:
    if chosen is not None:
        result = state.compute_for_classes(chosen)
    numbers = {
        "mIoU": result.miou,
        "mIoU_union": result.miou_occurring,
        "mIoU_all_classes": result.miou_all,
        "fwIoU": result.fwiou,
        "mACC": result.macc,
        "pACC": result.pacc,
    }
    rows = zip(names, result.per_class, result.truth_pixels, strict=True)
    per_class = [
        [name, percent(iou), pixels]
        for label, (name, iou, pixels) in enumerate(rows)
        if chosen is None or label in chosen
    ]
    tables = [
        columns(list(numbers), [[percent(value) for value in numbers.values()]]),
        columns(["class", "IoU", "pixels"], per_class),
    ]
    content = {**numbers, "IoU": list(result.per_class), "void_pixels": int(state.void_pixels().sum())}
    notes = [*notes, *_void_notes(state)]
    return score_report(content, f"{num_images} label maps, in per cent", num_images, notes, tables)


def _void_notes(state: MeanIoUState) -> list[str]:
    void = int(state.void_pixels().sum())
    labelled = int(state.confusion().sum()) + void
    return [f"{void:,} of {labelled:,} labelled pixels are predicted as void ({state.void}): missed"] if void else []
