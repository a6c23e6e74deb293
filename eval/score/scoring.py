"""One scoring of result files: the work on every image, the state that collects it, and the report at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from m2f.eval.metrics.average_precision import AveragePrecisionState
from m2f.eval.metrics.base import MetricState, Record
from m2f.eval.metrics.mean_iou import MeanIoUState
from m2f.eval.metrics.panoptic_quality import PanopticQualityState
from m2f.eval.results.images import image_records, image_table
from m2f.eval.results.results import EvaluationResults
from m2f.eval.score.parallel import CHUNK, map_jobs

Job = TypeVar("Job")
R = TypeVar("R", bound=Record)
Result = TypeVar("Result")


@dataclass(frozen=True)
class ScoreReport:
    """What `m2f score` found."""

    content: dict[str, Any]
    """For the JSON file: shares with full precision."""
    table: str
    """For the terminal: per cent."""


@dataclass(frozen=True)
class Judged(Generic[R]):
    """Records of one image where more than one metric is computed."""

    record: R
    """For `Scoring.state`."""
    more: Mapping[str, Record]
    """For `Scoring.more`, by name."""


@dataclass(frozen=True)
class OneByOne(Generic[Job, R]):
    """Work on some images, one after the other."""

    work: Callable[[Job], R | Judged[R]]

    def __call__(self, jobs: Sequence[Job]) -> list[R | Judged[R]]:
        """What the work gives for every job."""
        return [self.work(job) for job in jobs]


@dataclass(frozen=True)
class Scoring(Generic[Job, R, Result]):
    """What is to be done; nothing but JSON and file names has been read so far."""

    jobs: Sequence[Job]
    """One per image."""
    work: Callable[[Sequence[Job]], Sequence[R | Judged[R]]]
    """Reads the files of some images and compares them. Pickled for worker processes."""
    state: MetricState[R, Result]
    report: Callable[[Result], ScoreReport]
    results: Callable[[Result], EvaluationResults] | None = None
    """The same for an HTML page and for Python; None for the metrics of Cityscapes."""
    more: Mapping[str, MetricState] = field(default_factory=dict)
    """Of further metrics; `work` gives a record for each, and `results` looks at them."""
    names: Sequence[str] = ()
    """What the image of every job is called."""

    def run(self, workers: int, advance: Callable[[int], None]) -> ScoreReport:
        """Score all images in at most so many processes, one image at a time in each; `advance` hears of every image.

        Images are keyed by position: ids may be words, and sums are made in the order of the jobs. Raises UserError
        naming the image or file for everything that does not fit together.
        """
        return self.report(self.evaluate(workers, advance))

    def image_table(self) -> bytes:
        """Figures and records of every image as parquet, after a run; see `m2f.eval.results.images`."""
        state = self.state
        records = image_records(
            state if isinstance(state, PanopticQualityState) else None,
            state if isinstance(state, AveragePrecisionState) else None,
            state if isinstance(state, MeanIoUState) else None,
        )
        return image_table(records, dict(enumerate(self.names)))

    def evaluated(self, workers: int = 1) -> EvaluationResults:
        """The results for a page and for Python. Raises as `run` does."""
        assert self.results is not None
        return self.results(self.evaluate(workers, lambda _: None))

    def evaluate(self, workers: int, advance: Callable[[int], None]) -> Result:
        """As `run`, without the report."""
        workers = max(1, min(workers, math.ceil(len(self.jobs) / CHUNK)))
        for position, found in enumerate(map_jobs(self.work, self.jobs, workers)):
            self.state.add(position, found.record if isinstance(found, Judged) else found)
            if isinstance(found, Judged):
                for name, record in found.more.items():
                    self.more[name].add(position, record)
            advance(1)
        return self.state.compute()


def percent(share: float | None) -> float | None:
    """For tables; None stays, and so does what pycocotools marks as undefined with -1."""
    return None if share is None or share < 0 else 100 * share
