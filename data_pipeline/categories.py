"""The category table of a data set: ids, names, thing or stuff, colours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from data_pipeline.errors import DataError

Task = Literal["panoptic", "instance", "semantic"]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True, slots=True)
class Category:
    """One category as the source data set defines it."""

    id: int
    """Id in the source data set; may be sparse."""
    name: str
    is_thing: bool
    color: tuple[int, int, int]


@dataclass(frozen=True)
class CategoryTable:
    """Categories in the order of the source. Contiguous classes are positions in `for_task(task)`."""

    categories: tuple[Category, ...]

    def __post_init__(self) -> None:
        ids = [c.id for c in self.categories]
        if len(set(ids)) != len(ids):
            repeated = sorted({i for i in ids if ids.count(i) > 1})
            raise DataError(f"category ids must be unique; these appear more than once: {repeated[:10]}")

    @cached_property
    def by_id(self) -> dict[int, Category]:
        """Category of every source id."""
        return {c.id: c for c in self.categories}

    def for_task(self, task: Task) -> tuple[Category, ...]:
        """The classes that a model for this task predicts, in class order: only things for `instance`."""
        return tuple(c for c in self.categories if c.is_thing or task != "instance")

    def labels(self, task: Task) -> dict[int, int]:
        """Source id -> contiguous class of this task."""
        return {c.id: label for label, c in enumerate(self.for_task(task))}
