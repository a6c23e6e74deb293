"""Options of `m2f score` besides the files: which images and classes are scored, and how."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.instance_matching import AREA_BOUNDS, DetectionRecord
from m2f.eval.metrics.panoptic_quality import PanopticRecord
from m2f.eval.results.results import EvaluationSubject
from m2f.eval.score.files import ScoredCategory, first_few

Task = TypeVar("Task")
RecordT = TypeVar("RecordT", PanopticRecord, DetectionRecord)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Options of one scoring run. The defaults score everything, as the official code does."""

    images: tuple[str, ...] | None = None
    """Ids of images, or names of label maps; None: all."""
    classes: tuple[str, ...] | None = None
    """Names or ids of classes; None: all."""
    ignore_unknown: bool = False
    """Whether to leave out predictions of categories that the truth does not list."""
    area_bounds: tuple[float, float] = AREA_BOUNDS
    """Smallest areas of medium and of large segments, in pixels."""
    by_size: bool = False
    """Whether to add PQ by size, which takes longer."""
    max_dets: tuple[int, ...] | None = None
    """Limits of detections per image and class; None: those of the official code."""

    def __post_init__(self) -> None:
        medium, large = self.area_bounds
        if not 0 < medium < large < float("inf"):
            raise EvaluationError(
                f"area bounds are {medium:g} and {large:g} pixels; both must be above 0, and the second must be larger"
            )
        if self.max_dets is not None and (not self.max_dets or min(self.max_dets) < 1):
            raise EvaluationError(f"detection limits are {list(self.max_dets)}; each must be at least 1")


EVERYTHING = ScoreOptions()


def read_names(path: Path, *, by_label: bool = False) -> tuple[str, ...]:
    """Return the names or ids in a file, one per line, without empty lines.

    With `by_label`, the number of a line is the label of its class, so only the end may have empty lines. Raises
    EvaluationError naming the file.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read as text: {error}") from error
    if by_label and "" in lines:
        raise EvaluationError(f"{path}: line {lines.index('') + 1} is empty; give the class a name, or remove the line")
    names = tuple(line for line in lines if line)
    if not names:
        raise EvaluationError(f"{path} contains no names")
    return names


def chosen_images(listed: Iterable[object], options: ScoreOptions, where: str) -> Collection[str] | None:
    """Return the chosen ids as text; None: all. Raises EvaluationError for ids that the truth does not list."""
    if options.images is None:
        return None
    known = {str(image_id) for image_id in listed}
    if missing := [image_id for image_id in options.images if image_id not in known]:
        raise EvaluationError(f"{where} does not list {len(missing)} of the images to score: {first_few(missing)}")
    return frozenset(options.images)


def chosen_labels(categories: Sequence[ScoredCategory], options: ScoreOptions, where: str) -> frozenset[int] | None:
    """Return the positions of the chosen classes; None: all. A name stands for all classes that have it.

    Raises EvaluationError for a class that is not listed, and for a word that is the name of one class and the id of
    another.
    """
    if options.classes is None:
        return None
    by_id = {str(c.id): label for label, c in enumerate(categories)}
    by_name: dict[str, set[int]] = {}
    for label, category in enumerate(categories):
        by_name.setdefault(category.name, set()).add(label)
    if missing := [name for name in options.classes if name not in by_name and name not in by_id]:
        raise EvaluationError(
            f"{where} does not list {len(missing)} of the classes to score: {first_few(missing)}; "
            f"listed: {first_few([c.name for c in categories], 20)}"
        )
    chosen: set[int] = set()
    for word in options.classes:
        named, numbered = by_name.get(word, set()), {by_id[word]} if word in by_id else set()
        if named and numbered - named:
            raise EvaluationError(
                f"--classes {word}: in {where}, this is the id of class {categories[by_id[word]].name!r} and the name "
                f"of the class with id {first_few([categories[label].id for label in sorted(named)])}; use the name "
                "of the first or the id of the second, or rename a class"
            )
        chosen |= named | numbered
    return frozenset(chosen)


@dataclass(frozen=True)
class SelectClasses(Generic[Task, RecordT]):
    """Calls `work` and keeps only rows of some classes. This is exact, because classes are matched separately."""

    work: Callable[[Task], RecordT]
    labels: frozenset[int]

    def __call__(self, task: Task) -> RecordT:
        """Return the record of a task, without rows of other classes."""
        return select_classes(self.work(task), self.labels)


def select_classes(record: RecordT, labels: Collection[int]) -> RecordT:
    """Return an image's record with the rows of some classes only."""
    columns = {
        "label": ("label", "score", "matched", "ignored"),
        "truth_label": ("truth_label", "truth_count"),
        "matched_label": ("matched_label", "matched_iou", "matched_area"),
        "false_positive": ("false_positive", "false_positive_area"),
        "false_negative": ("false_negative", "false_negative_area"),
    }
    arrays = record.arrays()
    kept: dict[str, np.ndarray] = {}
    for class_column, names in columns.items():
        if class_column in arrays:
            rows = np.isin(arrays[class_column], list(labels))
            kept |= {name: arrays[name][rows] for name in names}
    return replace(record, **kept)


def scope_notes(options: ScoreOptions, num_images: int) -> list[str]:
    """Return lines for the title of a table that state which images and classes were chosen."""
    notes = []
    if options.images is not None:
        notes.append(f"SUBSET: {num_images} selected images")
    if options.classes is not None:
        notes.append(f"SOME CLASSES: {first_few(options.classes, 10)}")
    return notes


def unknown_notes(unknown: Collection[object]) -> list[str]:
    """Return a line about ignored predictions of unknown categories; no line if there are none."""
    if not unknown:
        return []
    listed = first_few(sorted(map(str, unknown)))
    return [f"ignored: predictions of categories that the truth does not list ({listed})"]


def category_table(categories: Sequence[ScoredCategory], *, things: bool = False) -> CategoryTable:
    """Return the category table for a page; with `things`, all classes are things regardless of the file."""
    return CategoryTable(tuple(Category(c.id, c.name, things or bool(c.is_thing), (0, 0, 0)) for c in categories))


def score_subject(predictions: Path, options: ScoreOptions, num_images: int) -> EvaluationSubject:
    """Return a description of what was scored, for a page."""
    return EvaluationSubject(
        dataset=predictions.name,
        fingerprint="",
        subset=None if options.images is None else f"{num_images} selected images",
        classes=None if options.classes is None else f"only {first_few(options.classes, 10)}",
    )
