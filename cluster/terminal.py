"""Output of the command line: lines of text, and progress as a live line (on a terminal) or as periodic lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from m2f.data_pipeline.printable import print_line, printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


def print_out(text: str = "", colors: bool = False) -> None:
    """Print a line of a verb's result to standard output. `colors` keeps colour codes in the text."""
    print_line(sys.stdout, text, colors)


def print_err(text: str) -> None:
    """Print a line of progress, a warning or an error to standard error."""
    print_line(sys.stderr, text)


def first_line(text: object) -> str:
    """Return the first line of a text or of an error's message that is not empty, at most 500 characters."""
    default = type(text).__name__ if isinstance(text, BaseException) else "unknown"
    return next((line.strip() for line in str(text).splitlines() if line.strip()), default)[:500]


def first_lines(items: Sequence[object], limit: int, rest: str) -> list[str]:
    """Return an indented line for each of the first `limit` items, and a line with the number of further items.

    `rest` is appended to that last line, for example to name the file with the further items.
    """
    more = [f"  and {len(items) - limit} more{rest}"] if len(items) > limit else []
    return [f"  {item}" for item in items[:limit]] + more


def describe_pace(
    done: float, total: float, done_before: float, elapsed_s: float, unit: str, num_bytes: int = 0
) -> str:
    """Return speed and remaining time, for example `12.3 images/s, 1.9 MB/s, 4:05 left`.

    Work of an earlier run (`done_before`) does not count towards the speed.
    """
    rate = (done - done_before) / max(elapsed_s, 1e-9)
    if rate <= 0 or elapsed_s < 0.1:  # too early to tell
        return f"- {unit}/s"
    volume = f"{num_bytes / 1e6 / elapsed_s:.1f} MB/s, " if num_bytes else ""
    return f"{rate:.1f} {unit}/s, {volume}{format_duration((total - done) / rate)} left"


def format_duration(seconds: float) -> str:
    """Format a duration as `0:42`, `12:05` or `3:07:09`."""
    minutes, secs = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


class Progress:
    """Context manager that shows progress of `total` units of work, on standard error unless `stream` is given.

    Only one thread may call `advance`.
    """

    def __init__(
        self,
        title: str,
        total: float,
        unit: str,
        done: int = 0,
        stream: TextIO | None = None,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._total, self._unit = printable(title), total, unit
        self._done_before = done
        self._done: float = done
        self._bytes = 0
        self._stream = sys.stderr if stream is None else stream
        self._interval_s, self._clock = interval_s, clock
        self._started = self._last_line_at = clock()
        self._last_printed: float | None = None
        self._bar: RichProgress | None = None
        if self._stream.isatty():
            self._bar = _rich_progress(self._stream)
            self._task = self._bar.add_task(self._title, total=total, completed=done, pace="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._last_printed != self._done:
            self._print_line()

    def advance(self, count: float, num_bytes: int = 0) -> None:
        """Record `count` more finished units and the number of bytes read or written for them."""
        self._done += count
        self._bytes += num_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, pace=self._pace())
        elif self._clock() - self._last_line_at >= self._interval_s:
            self._print_line()

    def note(self, text: str) -> None:
        """Print a line of text above the progress line."""
        if self._bar is not None:
            self._bar.console.print(printable(text), markup=False, highlight=False)
        else:
            print_line(self._stream, text)

    def _pace(self) -> str:
        elapsed_s = self._clock() - self._started
        return describe_pace(self._done, self._total, self._done_before, elapsed_s, self._unit, self._bytes)

    def _print_line(self) -> None:
        self._last_line_at, self._last_printed = self._clock(), self._done
        line = f"{self._title}: {self._done:.0f}/{self._total:.0f} {self._unit}, {self._pace()}"
        print_line(self._stream, line)


def _rich_progress(stream: TextIO) -> RichProgress:
    """Return a live progress line. Rich is imported here, because only terminals need it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}")
    return Progress(*columns, console=Console(file=stream))
