"""What run folders and CPU records of a comparison say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.arms import Run
from m2f.cluster.compare.records import parse_results


@dataclass(frozen=True)
class RunResult:
    """The newest evaluation of a run, and what the run has cost so far."""

    step: int
    images: int
    metrics: Mapping[str, float]
    """In per cent; undefined ones are missing."""
    cpu: CpuSeconds | None
    """None where a process was killed, whose seconds are not known."""


@dataclass(frozen=True)
class CpuSeconds:
    """Of all processes of a run, with their starts."""

    training: float
    evaluation: float


def read_run(folder: Path, run: Run) -> RunResult | None:
    """None while a run has no evaluation."""
    found = sorted((folder / "runs" / run.name / "evaluations").glob("step_*/val/results.json"))
    if not found:
        return None
    result = parse_results(found[-1].read_text())
    metrics = {name: value for name, value in result.metrics.items() if value is not None}
    return RunResult(result.step, result.num_images, metrics, read_cpu(folder / "cpu" / f"{run.name}.jsonl"))


def read_cpu(record: Path) -> CpuSeconds | None:
    """The sum over the processes of a run; None where one has no end."""
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    ends = [line for line in lines if line["event"] == "end"]
    if not ends or 2 * len(ends) != len(lines):
        return None
    return CpuSeconds(sum(line["training_s"] for line in ends), sum(line["evaluation_s"] for line in ends))
