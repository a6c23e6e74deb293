"""Faults that checks find in stored objects."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault with its place and remedy."""

    object: str
    """URL of the file."""
    key: str | None = None
    """Key of the sample; None if the fault concerns no single sample."""
    offset: int | None = None
    """First byte of the faulty part in the object; None if unknown."""
    problem: str
    remedy: str
    """What to do; empty if unknown."""

    def __str__(self) -> str:
        location = "" if self.offset is None else f" at byte {self.offset}"
        sample = "" if self.key is None else f" (sample {self.key!r})"
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.object}{location}{sample}: {self.problem}{remedy}"


def parse_fault(url: str, message: str) -> Fault:
    """Return the fault described by an error message. The last clause, after `; `, is the remedy; it may be missing."""
    problem, separator, remedy = message.rpartition("; ")
    if not separator:
        problem, remedy = message, ""
    return Fault(object=url, problem=problem.removeprefix(f"{url}: "), remedy=remedy)
