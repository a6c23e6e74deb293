"""Ranges of settings, given in annotations such as `lr: Annotated[float, ABOVE_0] = 1e-4` (standard library only)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from m2f.model.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Allowed values of a number, and its unit. For a list or a mapping, the range applies to every number in it."""

    low: float = -math.inf
    """Smallest allowed value."""
    high: float = math.inf
    """Largest allowed value."""
    above: bool = False
    """Whether `low` itself is excluded."""
    below: bool = False
    """Whether `high` itself is excluded."""
    rising: bool = False
    """Whether each number in a list must be larger than the previous one."""
    unit: str = ""
    """Unit shown in messages and in the documentation; empty if there is none."""

    def __contains__(self, number: float) -> bool:
        """Return whether the number is finite and within the range."""
        high_enough = number > self.low if self.above else number >= self.low
        low_enough = number < self.high if self.below else number <= self.high
        return math.isfinite(number) and high_enough and low_enough

    def __str__(self) -> str:
        """Return a text such as `above 0` or `at least 0 and below 1`, or `finite` if there are no limits."""
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.above else 'at least'} {self.low:g}")
        if self.high < math.inf:
            parts.append(f"{'below' if self.below else 'at most'} {self.high:g}")
        if self.rising:
            parts.append("larger than the previous one")
        return " and ".join(parts) or "finite"


FINITE = Range()
ABOVE_0 = Range(0, above=True)
FROM_0 = Range(0)
FROM_1 = Range(1)
SHARE = Range(0, 1)
SHARE_ABOVE_0 = Range(0, 1, above=True)
BELOW_1 = Range(0, 1, below=True)
PIXELS = Range(1, unit="pixels")
MEGAPIXELS = Range(0, unit="megapixels")
STEPS = Range(1, unit="steps")
STEPS_FROM_0 = Range(0, unit="steps")
RISING_STEPS = Range(1, rising=True, unit="steps")
SECONDS = Range(0, above=True, unit="seconds")
SECONDS_FROM_0 = Range(0, unit="seconds")
MEGABYTES = Range(0, above=True, unit="MB")
GIGABYTES = Range(0, above=True, unit="GB")


class Section:
    """Base class of all sections of a recipe.

    Creating a section checks its ranges, whether it is built in Python or read from a file.
    """

    def __post_init__(self) -> None:
        """Raise ConfigError if a number is outside the range of its setting."""
        ranges = ranges_of(type(self))
        problems = [p for name, value in vars(self).items() for p in range_problems(name, value, ranges.get(name))]
        if problems:
            raise ConfigError(f"{type(self).__name__}: {'; '.join(problems)}")


@lru_cache
def ranges_of(section: type) -> dict[str, Range]:
    """Return the ranges from the annotations of a section, by setting name."""
    hints = get_type_hints(section, include_extras=True)
    return {name: found for name, hint in hints.items() if (found := _range_in(hint)) is not None}


def range_problems(name: str, value: Any, allowed: Range | None) -> list[str]:
    """Return one message if any number in the value is out of range or out of order, otherwise an empty list.

    Without a range, every number must be finite.
    """
    allowed = allowed or FINITE
    numbers = list(_numbers(value))
    wrong = [number for number in numbers if number not in allowed]
    if not wrong and not (allowed.rising and any(after <= before for before, after in pairwise(numbers))):
        return []
    shown = list(value) if isinstance(value, tuple) else value
    which = "each" if isinstance(value, tuple | Mapping) else "it"
    finite = "" if allowed == FINITE or all(map(math.isfinite, wrong)) else "finite, "
    return [f"{name} is {shown}; {which} must be {finite}{allowed}"]


def _range_in(hint: Any) -> Range | None:
    if get_origin(hint) is not Annotated:
        return None
    return next((extra for extra in get_args(hint)[1:] if isinstance(extra, Range)), None)


def _numbers(value: Any) -> Iterable[float]:
    """Yield the numbers in a setting's value. Numbers inside nested sections are skipped; those sections check them."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, Mapping):
        yield from _numbers(list(value.values()))
