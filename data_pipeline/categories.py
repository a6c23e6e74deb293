"""The category table of a data set: id, name, thing or stuff, and colour of each category."""

from __future__ import annotations

import colorsys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.printable import to_ascii
from m2f.model.format_count import format_count

Task = Literal["panoptic", "instance", "semantic"]
MAX_CATEGORIES = 65_535
"""Upper limit of a table. A larger one is a mistake, because the largest data sets have a few thousand categories."""

TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True, slots=True)
class Category:
    """One category as the source data set defines it."""

    id: int
    """Id in the source data set. Ids may have gaps."""
    name: str
    is_thing: bool
    color: tuple[int, int, int]
    """RGB, each channel from 0 to 255."""


@dataclass(frozen=True)
class CategoryTable:
    """Categories in the order of the source.

    The contiguous class index of a category is its position in `for_task(task)`. Raises DataError for repeated ids and
    for more than MAX_CATEGORIES categories.
    """

    categories: tuple[Category, ...]

    def __post_init__(self) -> None:
        repeated = sorted(i for i, count in Counter(c.id for c in self.categories).items() if count > 1)
        if repeated:
            rows = [f"{i}: {', '.join(c.name for c in self.categories if c.id == i)}" for i in repeated[:10]]
            raise DataError(f"category ids must be unique; these appear more than once: {'; '.join(rows)}")
        if len(self.categories) > MAX_CATEGORIES:
            raise DataError(
                f"{len(self.categories)} categories exceed the limit of {MAX_CATEGORIES}; this is not a list of "
                "classes (are these ids of segments or images?)"
            )

    @cached_property
    def by_id(self) -> dict[int, Category]:
        """Return the categories by their source id."""
        return {c.id: c for c in self.categories}

    def for_task(self, task: Task) -> tuple[Category, ...]:
        """Return the classes that a model for this task predicts, in class order: for `instance` only things."""
        return tuple(c for c in self.categories if c.is_thing or task != "instance")

    def labels(self, task: Task) -> dict[int, int]:
        """Return the mapping from source id to contiguous class index for this task."""
        return {c.id: label for label, c in enumerate(self.for_task(task))}


def require_classes(categories: CategoryTable, task: Task, name: str) -> None:
    """Raise DataError, beginning with the name of the data set, if a model for this task would have no class."""
    if not categories.for_task(task):
        count = format_count(len(categories.categories), "class", "classes")
        raise DataError(
            f"{name} has {count} but no thing, so a model for the task {task} would have no class. Use the task "
            "semantic, or annotations that separate objects"
        )


def drawn_name(category: Category) -> str:
    """Return the name as pictures show it: names with non-ASCII letters become ASCII and are preceded by their id."""
    return category.name if category.name.isascii() else f"{category.id}: {to_ascii(category.name)}"


def distinct_color(number: int) -> tuple[int, int, int]:
    """Return an RGB colour for category `number` (from 0), for sources without colours.

    The result is deterministic. The first 1000 numbers have different colours.
    """
    hue = number * 0.618034 % 1.0  # steps of the golden ratio spread evenly for any number of categories
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.55 + 0.4 * (number % 3) / 2, 0.95 - 0.35 * (number % 2))
    return round(red * 255), round(green * 255), round(blue * 255)
