"""Live terminal view of a run: a panel below the log lines, redrawn twice a second.

Rich captures other output to standard output and standard error, and prints it above the panel.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from m2f.cluster.evaluation.choice import default_metric
from m2f.cluster.evaluation.lines import headline
from m2f.cluster.evaluation.manager import EvaluationProgress
from m2f.cluster.evaluation.queue import Entry
from m2f.cluster.terminal import format_duration, print_err, print_out
from m2f.model.format_count import format_count
from m2f.trainer.reporting import CommitReport, Event, Notice, NoticeKind, StepReport
from m2f.trainer.telemetry.numbers import StepMetrics, SystemUse

BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
SEPARATOR = " \u00b7 "
MAX_LOSSES = 2000
"""Number of newest losses that the chart covers. Each of its at most MAX_WIDTH bars is a mean of several."""
MAX_WIDTH = 100
"""Largest width of the panel in columns. Wider lines are hard to read."""
SILENCE_S, SILENCE_FACTOR = 20.0, 5.0
"""Seconds without a report after which the panel says so.

The time must also exceed `SILENCE_FACTOR` times the interval between the last two reports."""
_ALERT_KINDS: set[NoticeKind] = {"damaged", "skipped", "spike", "memory", "slow", "stalled"}


class LiveView:
    """Reporter that shows a run in a panel. Not thread-safe: call its methods from one thread only."""

    def __init__(
        self,
        name: str,
        max_steps: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._max_steps, self._clock = name, max_steps, clock
        self._live = Live(self, console=console, refresh_per_second=2)
        self._stage, self._workers, self._restarts = "starting", 0, -1
        self._key_hint = "Ctrl-C stops after a checkpoint"
        self._step = 0
        self._metrics: StepMetrics | None = None
        self._losses: deque[float] = deque(maxlen=MAX_LOSSES)
        self._reported_at = clock()
        self._interval_s = 0.0
        self._saved: tuple[int, float] | None = None
        self._evaluating: EvaluationProgress | None = None
        self._evaluated: list[Entry] = []

    def start(self) -> None:
        """Start drawing the panel periodically."""
        self._live.start()

    def stop(self, outcome: str) -> None:
        """Draw the panel one last time, with `outcome` as its stage, and leave it on the screen."""
        self._stage, self._evaluating, self._key_hint = outcome, None, ""
        with suppress(OSError):  # the terminal is gone, and the run must still end as it should
            self._live.stop()

    def show_interrupted(self) -> None:
        """Show that the user has asked the run to stop."""
        self._key_hint = "stopping after a checkpoint, Ctrl-C again stops now"

    def begin_attempt(self, workers: int) -> None:
        """Show that workers are starting. Every call after the first counts as a restart."""
        self._stage, self._workers, self._reported_at, self._interval_s = "starting", workers, self._clock(), 0.0
        self._restarts += 1

    def report(self, event: Event) -> None:
        """Show an event. RankReport is ignored, because StepReport summarizes all ranks."""
        match event:
            case StepReport(step, metrics):
                now = self._clock()
                self._interval_s = now - self._reported_at if self._stage == "training" else 0.0
                self._stage, self._reported_at = "training", now
                self._step, self._metrics = step, metrics
                self._losses.append(metrics.loss.total)
            case CommitReport(checkpoint):
                self._saved = checkpoint.step, self._clock()
                self._step = max(self._step, checkpoint.step)
            case Notice(kind, step, message):
                if kind in ("drained", "stopped", "finished"):
                    self._stage = "finishing" if kind == "finished" else "stopping"
                (print_err if kind in _ALERT_KINDS else print_out)(f"step {step}: {kind}: {message}")

    def show_evaluation(self, progress: EvaluationProgress | None) -> None:
        """Show the running evaluation; None removes it."""
        self._evaluating = progress

    def add_evaluation(self, entry: Entry) -> None:
        """Add a settled evaluation to the panel, which shows published results only."""
        self._evaluated.append(entry)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, MAX_WIDTH)
        rows = Table.grid(padding=(0, 2, 0, 0), expand=True)
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
        for title, content in self._rows(width - 18):
            rows.add_row(title, content)
        color = "yellow" if self._is_silent() else "cyan"
        yield Panel(
            rows,
            title=f"[bold]{self._name}[/]",
            subtitle=self._subtitle(),
            title_align="left",
            subtitle_align="left",
            border_style=color,
            width=width,
            padding=(0, 1),
        )

    def _rows(self, width: int) -> list[tuple[str, Text | Table]]:
        rows: list[tuple[str, Text | Table]] = [("step", self._progress())]
        if self._metrics is not None:
            rows += self._metric_rows(self._metrics, width)
        if self._saved is not None:
            step, saved_at = self._saved
            rows.append(("saved", Text(f"step {step:,}, {format_duration(self._clock() - saved_at)} ago")))
        if published := [entry for entry in self._evaluated if entry.status == "published"]:
            rows.append(("evaluated", Text(_evaluated(published))))
        if (now := self._evaluating) is not None:
            rows.append(("", Text(f"evaluating step {now.step:,} on {now.label}, {now.done} of {now.total} batches")))
        return rows

    def _metric_rows(self, metrics: StepMetrics, width: int) -> list[tuple[str, Text | Table]]:
        loss, ranks = metrics.loss, metrics.ranks
        parts = f"class {loss.class_:.4g}   mask {loss.mask:.4g}   dice {loss.dice:.4g}"
        spark = sparkline(self._losses, max(8, width - len(parts) - 16))
        rows: list[tuple[str, Text | Table]] = [
            ("loss", Text.assemble((f"{loss.total:.4g}", "bold"), "  ", (spark, "green"), "  ", parts)),
            ("pace", Text(_pace(metrics))),
            ("update", Text(_update(metrics))),
            ("machines", Text(_machines(metrics.system))),
        ]
        if ranks.slow:
            slow = f"rank {ranks.slowest:.0f} takes {ranks.slowest_over_median:.1f} times as long as the median rank"
            rows.append(("", Text(slow, style="yellow")))
        return rows

    def _progress(self) -> Table:
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        left = "" if self._metrics is None else f"{format_duration(self._metrics.throughput.eta_s)} left"
        bar = ProgressBar(total=self._max_steps, completed=self._step, width=None)
        count = Text.assemble((f"{self._step:,}", "bold"), f" / {self._max_steps:,}")
        row.add_row(count, bar, f"{100 * self._step / self._max_steps:.1f} %   {left}".rstrip())
        return row

    def _subtitle(self) -> str:
        workers = format_count(self._workers, "worker")
        parts = [f"starting {workers}"] if self._stage == "starting" else [self._stage, workers]
        if self._restarts > 0:
            parts.append(format_count(self._restarts, "restart"))
        if self._is_silent():
            parts.append(f"no report for {format_duration(self._clock() - self._reported_at)}")
        if self._key_hint:
            parts.append(self._key_hint)
        return SEPARATOR.join(parts)

    def _is_silent(self) -> bool:
        if self._stage not in ("starting", "training"):
            return False
        return self._clock() - self._reported_at > max(SILENCE_S, SILENCE_FACTOR * self._interval_s)


def sparkline(values: Sequence[float] | deque[float], width: int) -> str:
    """Return a bar chart of up to `width` characters; each bar is the mean of a segment of the values.

    The bars are scaled between the smallest and the largest mean. Infinite values and NaN are omitted.
    """
    numbers = [value for value in values if abs(value) < float("inf")]
    if not numbers:
        return ""
    count = min(width, len(numbers))
    cuts = [round(i * len(numbers) / count) for i in range(count + 1)]
    means = [sum(numbers[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def _pace(metrics: StepMetrics) -> str:
    pace = metrics.throughput
    parts = [f"{pace.images_per_s:.1f} images/s", f"{pace.step_time_s:.2f} s/step"]
    parts.append(f"data wait {100 * pace.data_wait_share:.0f} %")
    if metrics.mfu is not None:
        parts.append(f"MFU {100 * metrics.mfu:.0f} %")
    return SEPARATOR.join(parts)


def _update(metrics: StepMetrics) -> str:
    skipped = f"{SEPARATOR}{metrics.skipped_steps:.0f} skipped" if metrics.skipped_steps else ""
    return f"lr {metrics.lr:.3g}{SEPARATOR}gradient {metrics.grad_norm:.3g}{skipped}"


def _machines(system: SystemUse) -> str:
    parts = [f"CPU {system.cpu_percent:.0f} %", f"memory {system.memory_percent:.0f} %"]
    if system.gpu_percent is not None:
        parts.insert(0, f"GPU {system.gpu_percent:.0f} %")
    if system.gpu_memory_gb is not None:
        parts.insert(0, f"GPU memory {system.gpu_memory_gb:.1f} GB")
    parts.append(f"{system.disk_free_gb:.0f} GB of disk free")
    return SEPARATOR.join(parts)


def _evaluated(published: Sequence[Entry]) -> str:
    """Describe the last result, and the best one if it belongs to a different step.

    Results are compared by the first headline metric of the first evaluation set.
    """
    last = published[-1]
    text = f"step {last.step:,}: {headline(last.metrics)}"
    name = default_metric(last.metrics)
    if name is not None:
        best = max(published, key=lambda entry: entry.metrics.get(name, float("-inf")))
        if best is not last:
            text += f"   (best {name.rpartition('/')[2]} {best.metrics[name]:.2f} at {best.step:,})"
    return text
