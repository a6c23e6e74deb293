"""Evaluation in this process, for runs without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from m2f.cluster.evaluation.actor import EvaluationActor, EvaluationTask
from m2f.cluster.recipe.config import RunConfig


class LocalPool:
    """One EvaluationActor that does the calls one after the other."""

    def __init__(self, config: RunConfig, gpu: int = 0) -> None:
        self._actor = EvaluationActor(config, gpu)

    def run(self, task: EvaluationTask, batches: Iterable[int], take: Callable[[int, bytes], None]) -> None:
        """Evaluate all batches; `take(batch, states)` gets every result."""
        for batch in batches:
            take(batch, self._actor.evaluate(task, batch))

    def ask(self, method: str) -> list[Any]:
        """What the actor answers to a method without arguments."""
        return [getattr(self._actor, method)()]

    def close(self) -> None:
        """Nothing is left behind."""
