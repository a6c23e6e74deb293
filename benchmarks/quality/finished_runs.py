"""Read the results and CPU time of the runs of a comparison, and keep them without the run folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.arms import Run
from m2f.cluster.compare.set_result import parse_results


@dataclass(frozen=True)
class RunResult:
    """Newest evaluation of a run, and its CPU time so far."""

    step: int
    images: int
    metrics: Mapping[str, float]
    """Metrics in per cent; undefined metrics are missing."""
    cpu: CpuSeconds | None
    """CPU time; None if there is no record, or if a process was killed or still runs, because its time is unknown."""


@dataclass(frozen=True)
class CpuSeconds:
    """CPU time in seconds of all processes of a run, including their start-up."""

    training: float
    evaluation: float


def read_run(folders: Sequence[Path], run: Run) -> RunResult | None:
    """Read a run from the folder with its latest step; return None if it has no evaluation."""
    evaluations = [(result, folder) for folder in folders if (result := _newest_evaluation(folder, run)) is not None]
    if not evaluations:
        return None
    path, folder = max(evaluations, key=lambda evaluation: evaluation[0].parts[-3])
    result = parse_results(path.read_bytes(), str(path))
    metrics = {name: value for name, value in result.metrics.items() if value is not None}
    return RunResult(result.step, result.num_images, metrics, read_cpu(_cpu_record(folder, run)))


def keep_run(folder: Path, destination: Path, run: Run) -> None:
    """Copy the files that `read_run` needs, a few kilobytes, to `destination`. Do nothing if there is no evaluation."""
    evaluation = _newest_evaluation(folder, run)
    if evaluation is None:
        return
    for path in (evaluation, _cpu_record(folder, run)):
        if path.exists():
            target = destination / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _newest_evaluation(folder: Path, run: Run) -> Path | None:
    return max((folder / "runs" / run.name / "evaluations").glob("step_*/val/results.json"), default=None)


def _cpu_record(folder: Path, run: Run) -> Path:
    return folder / "cpu" / f"{run.name}.jsonl"


def read_cpu(record: Path) -> CpuSeconds | None:
    """Sum the CPU time of the processes of a run. Return None if there is no record, or a process has not ended."""
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    ends = [line for line in lines if line["event"] == "end"]
    if not ends or 2 * len(ends) != len(lines):
        return None
    return CpuSeconds(sum(line["training_s"] for line in ends), sum(line["evaluation_s"] for line in ends))
