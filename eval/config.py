"""Settings of evaluation (standard library only)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.categories import Task
from model.errors import require_at_least, require_positive


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """One named set that checkpoints are evaluated on."""

    dataset: str
    """Name under `datasets`."""
    limit: int | None = None
    """Only the first images; the results are labelled as a subset."""

    def __post_init__(self) -> None:
        if self.limit is not None:
            require_at_least(1, evaluation__sets__limit=self.limit)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is computed for every evaluated checkpoint, and by whom."""

    sets: tuple[EvaluationSet, ...] = ()
    tasks: tuple[Task, ...] = ("panoptic",)
    """panoptic: PQ; instance: mask AP; semantic: mIoU. All from one forward pass."""
    policy: Literal["every", "latest"] = "every"
    """Evaluate every committed checkpoint, or drop stale ones that still wait."""
    shortest_edge: int = 800
    max_size: int = 1333
    """Test-time resize: shorter side to `shortest_edge`, longer side at most `max_size`."""
    batch_size: int = 1
    """Images per forward; fixed by the manifest's order, so results do not depend on the actors."""
    actors: int = 1
    num_cpus_per_actor: float = 1.0
    num_gpus_per_actor: float = 0.0
    resources_per_actor: Mapping[str, float] = field(default_factory=dict)
    """Custom Ray resources that each takes, for example `{evaluator: 1}`: it runs only on nodes that offer them."""
    threads: int = 1
    """Torch threads per actor on CPU."""
    hang_s: float = 1800.0
    """Seconds without an answer to a call of eight images, after which an actor is replaced."""
    panels: int = 8
    """Fixed images drawn per evaluation (image, truth, prediction), and half as many of the worst."""

    def __post_init__(self) -> None:
        names = ("shortest_edge", "max_size", "batch_size", "actors", "threads")
        require_at_least(1, **{f"evaluation__{name}": getattr(self, name) for name in names})
        require_at_least(0, evaluation__panels=self.panels)
        require_positive(evaluation__hang_s=self.hang_s)
