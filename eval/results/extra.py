"""Optional metrics in per cent, computed only on request, as by `evaluation.extra_metrics`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from m2f.data_pipeline.categories import Category
from m2f.eval.metrics.base import Numbers
from m2f.eval.metrics.extra.task_metric import TaskMetric, task_metrics


class Group(NamedTuple):
    """Values of one metric, shown as one table."""

    title: str
    prefix: str
    """Prefix of the metrics' full names."""
    numbers: Numbers


@dataclass(frozen=True)
class ExtraResults:
    """Results of the extra metrics that were requested."""

    by_key: Mapping[str, Any] = field(default_factory=dict)
    """What the states computed, by `TaskMetric.key`."""

    def groups(self) -> list[Group]:
        """Return one group for every requested metric."""
        return [Group(metric.title, metric.prefix, metric.values(result)) for metric, result in self._results()]

    def metrics(self) -> Numbers:
        """Return all values by full name (prefix and name)."""
        return {f"{g.prefix}{name}": value for g in self.groups() for name, value in g.numbers.items()}

    def class_values(self, category: Category, label: int, thing_label: int | None) -> Numbers:
        """Return the values of one category by full name.

        `label` is its class index in the panoptic task, and `thing_label` that in the instance task (None for stuff).
        """
        row: Numbers = {}
        for metric, result in self._results():
            numbers = metric.class_values(result, category, thing_label if metric.task == "instance" else label)
            row |= {f"{metric.prefix}{name}": value for name, value in numbers.items()}
        return row

    def _results(self) -> list[tuple[TaskMetric, Any]]:
        return [(metric, self.by_key[metric.key]) for metric in task_metrics() if metric.key in self.by_key]
