"""Scoring of result files: the work on each image, the state that collects it, and the final report."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from m2f.eval.metrics.average_precision import AveragePrecisionState
from m2f.eval.metrics.base import MetricState, Record
from m2f.eval.metrics.mean_iou import MeanIoUState
from m2f.eval.metrics.panoptic_quality import PanopticQualityState
from m2f.eval.results.images import image_records, image_table
from m2f.eval.results.results import EvaluationResults
from m2f.eval.score.parallel import CHUNK, map_tasks

Task = TypeVar("Task")
R = TypeVar("R", bound=Record)
Result = TypeVar("Result")


@dataclass(frozen=True)
class ScoreReport:
    """Result of `m2f score`."""

    content: dict[str, Any]
    """Content of the JSON file: shares in full precision, `num_images`, and `notes`."""
    table: str
    """Text for the terminal, in per cent."""


def score_report(
    content: Mapping[str, Any], title: str, num_images: int, notes: Sequence[str], tables: Sequence[str]
) -> ScoreReport:
    """Return a report whose text and JSON file both have the notes. `title` and the notes are above the tables."""
    content = {**content, "num_images": num_images, "notes": list(notes)}
    return ScoreReport(content, "\n\n".join(["\n".join([title, *notes]), *tables]))


@dataclass(frozen=True)
class MultiRecord(Generic[R]):
    """Records of one image for several metrics."""

    record: R
    """Record for `Scoring.state`."""
    extra: Mapping[str, Record]
    """Records for `Scoring.extra_states`, by name."""


@dataclass(frozen=True)
class OneByOne(Generic[Task, R]):
    """Calls `work` for several images, one image at a time."""

    work: Callable[[Task], R | MultiRecord[R]]

    def __call__(self, tasks: Sequence[Task]) -> list[R | MultiRecord[R]]:
        """Return the result of the work for every task."""
        return [self.work(task) for task in tasks]


@dataclass(frozen=True)
class Scoring(Generic[Task, R, Result]):
    """A prepared scoring run. Besides JSON files, only masks of the truth have been read, for checks."""

    tasks: Sequence[Task]
    """One task per image."""
    work: Callable[[Sequence[Task]], Sequence[R | MultiRecord[R]]]
    """Function that reads and compares the files of several images. It is pickled for worker processes."""
    state: MetricState[R, Result]
    report: Callable[[Result], ScoreReport]
    results: Callable[[Result], EvaluationResults] | None = None
    """Function that makes results for an HTML page and for Python; None for Cityscapes and class-agnostic metrics."""
    extra_states: Mapping[str, MetricState] = field(default_factory=dict)
    """States of additional metrics, by name; `work` returns a record for each, and `results` reads them."""
    names: Sequence[str] = ()
    """Name of every task's image."""
    classes: Collection[int] | None = None
    """Classes that mIoU averages; None: all. For PQ and AP, `work` leaves out the other classes."""
    limit: int | None = None
    """Detections per image and class that AP counts; None: all."""
    doubts: Sequence[str] = ()
    """Lines about truth that contradicts itself. The report has them, too."""

    def run(self, workers: int, advance: Callable[[int], None]) -> ScoreReport:
        """Score all images in at most `workers` processes; `advance` is called after every image.

        A process handles at most CHUNK images at a time. Records are keyed by the position of the task, because image
        ids may be text, and are reduced in this order. Raises UserError naming the image or file if inputs do not match
        each other.
        """
        return self.report(self.evaluate(workers, advance))

    def image_table(self) -> bytes:
        """Return values and records of every image as parquet, after a run; see `m2f.eval.results.images`."""
        state = self.state
        records = image_records(
            state if isinstance(state, PanopticQualityState) else None,
            state if isinstance(state, AveragePrecisionState) else None,
            state if isinstance(state, MeanIoUState) else None,
            classes=self.classes,
            limit=self.limit,
        )
        return image_table(records, dict(enumerate(self.names)))

    def compute_results(self, workers: int = 1) -> EvaluationResults:
        """Score all images and return the results for a page and for Python. Raises the errors of `run`.

        Doubts about the truth become warnings.
        """
        assert self.results is not None
        for line in self.doubts:
            warnings.warn(line, stacklevel=3)
        return self.results(self.evaluate(workers, lambda _: None))

    def evaluate(self, workers: int, advance: Callable[[int], None]) -> Result:
        """Score all images as `run` does, and return the metric without a report."""
        workers = max(1, min(workers, math.ceil(len(self.tasks) / CHUNK)))
        for position, scored in enumerate(map_tasks(self.work, self.tasks, workers)):
            self.state.add(position, scored.record if isinstance(scored, MultiRecord) else scored)
            if isinstance(scored, MultiRecord):
                for name, record in scored.extra.items():
                    self.extra_states[name].add(position, record)
            advance(1)
        return self.state.compute()
