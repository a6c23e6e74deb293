"""Pool that evaluates in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from m2f.cluster.evaluation.actor import EvaluationActor, EvaluationTask
from m2f.cluster.recipe.config import RunConfig


class LocalPool:
    """Pool with one EvaluationActor in this process, which evaluates one batch at a time."""

    def __init__(self, config: RunConfig, gpu: int = 0) -> None:
        self._actor = EvaluationActor(config, gpu)

    def run(self, task: EvaluationTask, batches: Iterable[int], on_result: Callable[[int, bytes], None]) -> None:
        """Evaluate all batches and pass every result to `on_result(batch, states)`."""
        for batch in batches:
            on_result(batch, self._actor.evaluate(task, batch))

    def ask(self, method: str) -> list[Any]:
        """Call a method without arguments on the actor and return its answer in a list."""
        return [getattr(self._actor, method)()]

    def close(self) -> None:
        """Do nothing: there are no processes to end."""
