"""mIoU and accuracies of label maps. `mIoU` follows detectron2; `MeanIoU` documents the two other conventions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.readers.files import files_below
from m2f.data_pipeline.readers.map_reader import LOSSY_ENDINGS, OTHER_MAP_ENDINGS
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.base import percent
from m2f.eval.metrics.mean_iou import (
    BINARY_MASK,
    ConfusionRecord,
    MeanIoU,
    MeanIoUState,
    ignore_label,
    is_binary_mask,
)
from m2f.eval.results.results import EvaluationResults, EvaluationSubject, columns
from m2f.eval.score.files import SURROGATE, ScoredCategory, first_few, read_labels, require_folder
from m2f.eval.score.options import (
    EVERYTHING,
    ScoreOptions,
    category_table,
    chosen_images,
    chosen_labels,
    scope_notes,
    score_subject,
)
from m2f.eval.score.scoring import OneByOne, ScoreReport, Scoring, score_report
from m2f.model.format_count import format_count

MapPair = tuple[str, str]
"""Names of a map of the truth and of its prediction, relative to their folders."""
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
) -> Scoring[MapPair, ConfusionRecord, MeanIoU]:
    """Prepare the scoring of mIoU over all label maps under `truth`; see `label_maps` for their names.

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
    pairs, notes = label_maps(truth, predictions)
    selected = chosen_images((alias for name, _ in pairs for alias in (name, _stem(name))), options, str(truth))
    pairs = [(name, p) for name, p in pairs if selected is None or name in selected or _stem(name) in selected]
    names = [name for name, _ in pairs]
    if ignore is None and is_binary_mask(_label_values(truth, names), ignore, num_classes):
        raise EvaluationError(f"the label maps in {truth} have {BINARY_MASK} (`m2f score`: --ignore 255)")
    state = MeanIoUState(num_classes, ignore, ignore_label(num_classes) if void is None else void)
    subject = score_subject(predictions, options, len(names))
    return Scoring(
        tasks=pairs,
        work=OneByOne(_ScoreImage(truth, predictions, num_classes, state.ignore, state.void)),
        state=state,
        report=partial(_report, shown, chosen, [*scope_notes(options, len(names)), *notes], state, len(names)),
        results=partial(_results, category_table(categories), subject, chosen, notes, state, len(names)),
        names=names,
        classes=chosen,
    )


def _results(
    table: CategoryTable,
    subject: EvaluationSubject,
    chosen: Collection[int] | None,
    notes: Sequence[str],
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
        notes=[*notes, *_void_notes(state)],
    )


def label_maps(truth: Path, predictions: Path) -> tuple[list[MapPair], list[str]]:
    """Return the maps of the truth with their predictions, sorted by name, and lines about files that are not scored.

    A map is a PNG, or a TIFF or BMP if no PNG has the same stem. A prediction has the name of its map, or the stem of
    its map and another ending. Raises EvaluationError if a prediction is missing, and for a stem with several maps.
    """
    require_folder(truth, "the label maps of the truth")
    require_folder(predictions, "the predicted label maps")
    files = [path.relative_to(truth).as_posix() for path in files_below(truth, "")]
    maps = _by_stem(files, OTHER_MAP_ENDINGS) | _by_stem(files, (".png",))
    if not maps:
        raise EvaluationError(f"{truth} contains no PNG, TIFF or BMP files")
    if repeated := [names for names in maps.values() if len(names) > 1]:
        raise EvaluationError(f"{truth}: {' and '.join(repeated[0])} have the same stem; keep one of them")
    names = sorted(names[0] for names in maps.values())
    if invalid := [name for name in names if SURROGATE.search(name)]:
        raise EvaluationError(f"{truth}: the file name {invalid[0]!a:.100} is not valid UTF-8; rename the file")
    found = {name: _prediction(predictions, name) for name in names}
    if missing := [name for name, predicted in found.items() if predicted is None]:
        raise EvaluationError(
            f"{predictions} does not contain {len(missing)} of {len(names)} maps: {first_few(missing)}"
        )
    pairs = [(name, predicted) for name, predicted in found.items() if predicted is not None]
    lossy = _by_stem(files, LOSSY_ENDINGS)
    unread = [name for stem, others in lossy.items() if stem not in maps for name in others]
    if not unread:
        return pairs, []
    note = (
        f"{format_count(len(unread), 'JPEG or WebP file')} in {truth} without a map of the same name: not scored, "
        f"because these formats change labels: {first_few(unread)}"
    )
    return pairs, [note]


def _by_stem(names: Sequence[str], endings: Collection[str]) -> dict[str, list[str]]:
    """Return the names that have one of the endings, by stem. The case of the ending is ignored."""
    by_stem: dict[str, list[str]] = {}
    for name in names:
        if PurePosixPath(name).suffix.lower() in endings:
            by_stem.setdefault(_stem(name), []).append(name)
    return by_stem


def _prediction(predictions: Path, name: str) -> str | None:
    """Return the relative name of the prediction for a map; None if it does not exist."""
    others = (_stem(name) + ending for ending in (".png", *OTHER_MAP_ENDINGS))
    return next((candidate for candidate in (name, *others) if (predictions / candidate).is_file()), None)


def _stem(name: str) -> str:
    """Return a relative name without its ending."""
    return PurePosixPath(name).with_suffix("").as_posix()


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

    def __call__(self, pair: MapPair) -> ConfusionRecord:
        name, predicted_name = pair
        state = MeanIoUState(self.num_classes, self.ignore, self.void)
        truth, predicted = read_labels(self.truth / name), read_labels(self.predictions / predicted_name)
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
