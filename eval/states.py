"""The states of all tasks of one evaluation together, with its panels: what an actor returns and a driver merges."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from data_pipeline.categories import CategoryTable, Task
from eval.average_precision import AveragePrecisionState
from eval.errors import EvaluationError
from eval.mean_iou import MeanIoUState
from eval.panoptic_quality import PanopticQualityState
from eval.report import EvaluationResults, EvaluationSubject
from eval.state import MetricState

_STATE_TYPES = {"panoptic": PanopticQualityState, "instance": AveragePrecisionState, "semantic": MeanIoUState}


@dataclass
class EvaluationStates:
    """Metric states of the requested tasks (None: not requested) and PNG panels by image id."""

    panoptic: PanopticQualityState | None = None
    instance: AveragePrecisionState | None = None
    semantic: MeanIoUState | None = None
    panels: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def empty(cls, categories: CategoryTable, tasks: Collection[Task]) -> Self:
        """States of these tasks without an image."""
        classes = categories.for_task("panoptic")
        return cls(
            panoptic=PanopticQualityState([c.is_thing for c in classes]) if "panoptic" in tasks else None,
            instance=AveragePrecisionState(len(categories.for_task("instance"))) if "instance" in tasks else None,
            semantic=MeanIoUState(len(classes)) if "semantic" in tasks else None,
        )

    def metric_states(self) -> dict[str, MetricState]:
        """The states by task."""
        states = {"panoptic": self.panoptic, "instance": self.instance, "semantic": self.semantic}
        return {task: state for task, state in states.items() if state is not None}

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Images that every requested task has seen, ascending."""
        seen = [set(state.image_ids) for state in self.metric_states().values()]
        return tuple(sorted(set.intersection(*seen))) if seen else ()

    def merge(self, other: Self) -> None:
        """Take over the images of another evaluation of the same tasks. Raises EvaluationError if the two disagree."""
        mine, theirs = self.metric_states(), other.metric_states()
        if mine.keys() != theirs.keys():
            raise EvaluationError(f"cannot merge evaluations of {sorted(mine)} and of {sorted(theirs)}")
        for task, state in mine.items():
            state.merge(theirs[task])
        self.panels |= other.panels

    def compute(self, categories: CategoryTable, subject: EvaluationSubject) -> EvaluationResults:
        """Reduce every state."""
        return EvaluationResults(
            subject=subject,
            categories=categories,
            num_images=len(self.image_ids),
            panoptic=self.panoptic.compute() if self.panoptic is not None else None,
            instance=self.instance.compute() if self.instance is not None else None,
            semantic=self.semantic.compute() if self.semantic is not None else None,
        )

    def to_bytes(self) -> bytes:
        """Everything as one npz file without pickles; equal states give equal bytes."""
        parts = {f"state.{task}": state.to_bytes() for task, state in self.metric_states().items()}
        parts |= {f"panel.{image_id}": self.panels[image_id] for image_id in sorted(self.panels)}
        buffer = io.BytesIO()
        arrays = {name: np.frombuffer(part, dtype=np.uint8) for name, part in parts.items()}
        np.savez(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, payload: bytes) -> Self:
        """What `to_bytes` wrote. Raises EvaluationError for anything else; never unpickles."""
        states = cls()
        try:
            with np.load(io.BytesIO(payload), allow_pickle=False) as parts:
                for name in parts.files:
                    kind, _, key = name.partition(".")
                    part = parts[name].tobytes()
                    if kind == "panel":
                        states.panels[int(key)] = part
                    else:
                        setattr(states, key, _STATE_TYPES[key].from_bytes(part))
        except (OSError, EOFError, KeyError, ValueError, AttributeError, zipfile.BadZipFile) as error:
            raise EvaluationError(
                f"{len(payload)} bytes are not stored evaluation states ({error}); evaluate again"
            ) from error
        return states


def check_complete(states: EvaluationStates, expected_ids: Collection[int]) -> None:
    """Refuse to publish: raises EvaluationError unless exactly the expected images were evaluated for every task."""
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
