"""One scoring of result files: the work on every image, the state that collects it, and the report at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from m2f.eval.metrics.base import MetricState, Record
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
class Scoring(Generic[Job, R, Result]):
    """What is to be done; nothing but JSON and file names has been read so far."""

    jobs: Sequence[Job]
    """One per image."""
    work: Callable[[Job], R]
    """Reads the files of one image and compares them. Pickled for worker processes."""
    state: MetricState[R, Result]
    report: Callable[[Result], ScoreReport]

    def run(self, workers: int, advance: Callable[[int], None]) -> ScoreReport:
        """Score all images in at most so many processes, one image at a time in each; `advance` hears of every image.

        Images are keyed by position: ids may be words, and sums are made in the order of the jobs. Raises UserError
        naming the image or file for everything that does not fit together.
        """
        workers = max(1, min(workers, math.ceil(len(self.jobs) / CHUNK)))
        for position, record in enumerate(map_jobs(self.work, self.jobs, workers)):
            self.state.add(position, record)
            advance(1)
        return self.report(self.state.compute())


def percent(share: float | None) -> float | None:
    """For tables; None stays, and so does what pycocotools marks as undefined with -1."""
    return None if share is None or share < 0 else 100 * share
