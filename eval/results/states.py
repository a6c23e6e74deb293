"""Metric states of all tasks of one evaluation, and its panels. Actors return them, and the driver merges them."""

from __future__ import annotations

import io
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from m2f.data_pipeline.categories import CategoryTable, Task
from m2f.eval.config import ExtraMetric
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.average_precision import AveragePrecisionState
from m2f.eval.metrics.base import UNREADABLE, MetricState
from m2f.eval.metrics.error_types import ErrorState
from m2f.eval.metrics.extra.task_metric import ScoredImage, task_metrics
from m2f.eval.metrics.mean_iou import ConfusionRecord, MeanIoUState, split_cells
from m2f.eval.metrics.panoptic_quality import PanopticQualityState
from m2f.eval.metrics.segment_errors import SegmentErrorState
from m2f.eval.results.extra import ExtraResults
from m2f.eval.results.results import EvaluationResults, EvaluationSubject

_STATE_TYPES = {
    "panoptic": PanopticQualityState,
    "instance": AveragePrecisionState,
    "semantic": MeanIoUState,
    "segments": SegmentErrorState,
    "errors": ErrorState,
}


@dataclass
class EvaluationStates:
    """Metric states of the requested tasks (None: not requested) and PNG panels by image id."""

    panoptic: PanopticQualityState | None = None
    instance: AveragePrecisionState | None = None
    semantic: MeanIoUState | None = None
    segments: SegmentErrorState | None = None
    """Segment errors of the panoptic task, else of the instance task; None if neither is requested."""
    errors: ErrorState | None = None
    """Error types of the same task."""
    extra: dict[str, MetricState] = field(default_factory=dict)
    """States of the extra metrics by `TaskMetric.key`, in the order of `EXTRA_METRICS`."""
    panels: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def empty(cls, categories: CategoryTable, tasks: Collection[Task], extra: Collection[ExtraMetric] = ()) -> Self:
        """Return empty states for these tasks, and for the extra metrics that apply to them."""
        things, classes = (categories.for_task(task) for task in ("instance", "panoptic"))
        is_thing = [c.is_thing for c in classes]
        segment_task: Task | None = next((task for task in ("panoptic", "instance") if task in tasks), None)
        states = cls(
            panoptic=PanopticQualityState(is_thing) if "panoptic" in tasks else None,
            instance=AveragePrecisionState(len(things)) if "instance" in tasks else None,
            semantic=MeanIoUState(len(classes)) if "semantic" in tasks else None,
        )
        if segment_task is not None:
            num_classes = len(categories.for_task(segment_task))
            states.segments = SegmentErrorState(num_classes)
            states.errors = ErrorState(num_classes, "PQ" if segment_task == "panoptic" else "AP50")
        requested = (metric for metric in task_metrics(extra) if metric.task in tasks)
        states.extra = {metric.key: metric.empty_state(categories) for metric in requested}
        return states

    def metric_states(self) -> dict[str, MetricState]:
        """Return the states by name: those of tasks, segments, errors and extra metrics."""
        states = {name: getattr(self, name) for name in _STATE_TYPES}
        return {task: state for task, state in states.items() if state is not None} | self.extra

    def update_extra(self, task: Task, image: ScoredImage) -> None:
        """Add one image to the states of all extra metrics of a task."""
        for metric in task_metrics():
            if metric.task == task and metric.key in self.extra:
                metric.update(self.extra[metric.key], image)

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Ids of the images that every state contains, in ascending order."""
        ids = [set(state.image_ids) for state in self.metric_states().values()]
        return tuple(sorted(set.intersection(*ids))) if ids else ()

    def merge(self, other: Self) -> None:
        """Add the images of another evaluation of the same tasks. Raises EvaluationError if the two disagree."""
        mine, theirs = self.metric_states(), other.metric_states()
        if mine.keys() != theirs.keys():
            raise EvaluationError(f"cannot merge evaluations of {sorted(mine)} and of {sorted(theirs)}")
        for task, state in mine.items():
            state.merge(theirs[task])
        self.panels |= other.panels

    def spill(self, folder: Path, threshold_bytes: int) -> None:
        """Move the records of every metric above `threshold_bytes` to files under `folder`, see `MetricState`."""
        for name, state in self.metric_states().items():
            state.spill(folder / name, threshold_bytes)

    def compute(self, categories: CategoryTable, subject: EvaluationSubject) -> EvaluationResults:
        """Compute the results of every state."""
        return EvaluationResults(
            subject=subject,
            categories=categories,
            num_images=len(self.image_ids),
            panoptic=self.panoptic.compute() if self.panoptic is not None else None,
            instance=self.instance.compute() if self.instance is not None else None,
            semantic=self.semantic.compute() if self.semantic is not None else None,
            segments=self.segments.compute() if self.segments is not None else None,
            errors=self.errors.compute() if self.errors is not None else None,
            pixels=self.semantic.confusion() if self.semantic is not None else None,
            extra=ExtraResults({key: state.compute() for key, state in self.extra.items()}),
        )

    def to_bytes(self) -> bytes:
        """Return everything as one npz file without pickles. Equal states give equal bytes."""
        parts = {f"state.{task}": state.to_bytes() for task, state in self.metric_states().items()}
        parts |= {f"panel.{image_id}": self.panels[image_id] for image_id in sorted(self.panels)}
        buffer = io.BytesIO()
        arrays = {name: np.frombuffer(part, dtype=np.uint8) for name, part in parts.items()}
        np.savez(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, payload: bytes) -> Self:
        """Restore the output of `to_bytes`. Raises EvaluationError for any other content; never unpickles."""
        states = cls()
        extra_types = {metric.key: metric.state_type for metric in task_metrics()}
        try:
            with np.load(io.BytesIO(payload), allow_pickle=False) as parts:
                for name in parts.files:
                    kind, _, key = name.partition(".")
                    part = parts[name].tobytes()
                    if kind == "panel":
                        states.panels[int(key)] = part
                    elif key in extra_types:
                        states.extra[key] = extra_types[key].from_bytes(part)
                    else:
                        setattr(states, key, _STATE_TYPES[key].from_bytes(part))
        except UNREADABLE as error:
            raise EvaluationError(
                f"cannot read evaluation states from {len(payload)} bytes ({error}); evaluate again"
            ) from error
        return states


def image_qualities(states: EvaluationStates) -> dict[int, float]:
    """Return the quality of every image's prediction, 0 to 1, by image id, to choose pictures; not for publication.

    The quality is the PQ of the image. Without PQ it is the number of matched instances divided by the mean number of
    annotated and detected ones, else the pixel accuracy. Images whose quality is undefined are left out.
    """
    if states.semantic is not None and states.segments is None:
        qualities = {
            image_id: _pixel_accuracy(states.semantic.record(image_id), states.semantic.num_classes)
            for image_id in states.semantic.image_ids
        }
    else:
        scored = states.panoptic or states.segments
        assert scored is not None
        qualities = {image_id: scored.image_quality(image_id) for image_id in scored.image_ids}
    return {image_id: quality for image_id, quality in qualities.items() if quality is not None}


def _pixel_accuracy(record: ConfusionRecord, num_classes: int) -> float | None:
    truth, predicted = split_cells(record.cell, num_classes)
    pixels = int(record.pixels.sum())
    return int(record.pixels[truth == predicted].sum()) / pixels if pixels else None


def check_complete(states: EvaluationStates, expected_ids: Collection[int]) -> None:
    """Raise EvaluationError unless every state has exactly the expected images. Called before publishing."""
    expected = set(expected_ids)
    for task, state in states.metric_states().items():
        evaluated = set(state.image_ids)
        for problem, ids in (("missing", expected - evaluated), ("unexpected", evaluated - expected)):
            if ids:
                named = ", ".join(map(str, sorted(ids)[:10])) + (", ..." if len(ids) > 10 else "")
                raise EvaluationError(
                    f"{task} results are not published: {len(ids)} of {len(expected)} images are {problem} ({named}); "
                    "evaluate the checkpoint again"
                )
