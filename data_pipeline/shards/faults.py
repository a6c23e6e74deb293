"""What checks find wrong in stored objects, one entry per fault."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong."""

    object: str
    """URL of the file."""
    key: str | None = None
    """The sample; None where it is not about one."""
    offset: int | None = None
    """First byte in the object of what is wrong, where that is known."""
    problem: str
    remedy: str

    def __str__(self) -> str:
        place = "" if self.offset is None else f" at byte {self.offset}"
        sample = "" if self.key is None else f" (sample {self.key!r})"
        return f"{self.object}{place}{sample}: {self.problem}; {self.remedy}"


def fault_of_message(url: str, message: str) -> Fault:
    """A fault of a message whose last clause is the remedy, as in all errors for users."""
    problem, _, remedy = message.rpartition("; ")
    return Fault(object=url, problem=problem.removeprefix(f"{url}: "), remedy=remedy)
