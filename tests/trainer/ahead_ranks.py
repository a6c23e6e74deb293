"""Scenario of test_ahead.py: the host reads a step's results after queuing the next step. Not a test module."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import m2f.trainer.setup
from m2f.trainer.config import CheckpointConfig, SpikeConfig, ZeroConfig
from m2f.trainer.engine.engine import Engine
from m2f.trainer.job import TrainJob
from tests.trainer.run_ranks import poisoned_position
from tests.trainer.tiny_job import StopAt, make_job, train

MAX_STEPS, LOG_EVERY_STEPS, SAVE_EVERY_STEPS = 9, 4, 6


def ahead(folder: Path, stage: str) -> dict:
    """Train with outcomes read at once and one step later; each run once to the end and once stopped early.

    One step is skipped, and spike detection is on.
    """
    seen = {}
    for kind in ("at once", "ahead"):
        calls: list[tuple[str, int]] = []
        with poisoned_position(9), _recording_engine(kind == "ahead", calls):
            job = _job(folder / kind, stage)
            seen[kind] = _comparable_result(job, train(job))
            seen[f"order {kind}"] = calls
            stopped = _job(folder / f"{kind} stopped", stage)
            seen[f"{kind} stopped"] = _comparable_result(stopped, train(stopped, control=StopAt(polls=5)))
    return seen


def _job(folder: Path, stage: str) -> TrainJob:
    return make_job(
        folder.with_name(f"{folder.name} {stage}"),
        str(folder.parent / "shards"),
        max_steps=MAX_STEPS,
        log_every_steps=LOG_EVERY_STEPS,
        checkpoint=CheckpointConfig(every_steps=SAVE_EVERY_STEPS),
        spikes=SpikeConfig(window=2, threshold=0.01, steps=1),
        zero=ZeroConfig(stage=int(stage)),
        ema_decay=0.9,
    )


@contextmanager
def _recording_engine(ahead: bool, calls: list[tuple[str, int]]) -> Iterator[None]:
    """Set `Engine.runs_ahead` to `ahead` and append engine calls to `calls`.

    Calls are `compute`, `update`, and `finish_update` with the step number; the others have 0 instead.
    """

    class RecordingEngine(Engine):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            assert not self.runs_ahead  # the default on a CPU
            self.runs_ahead = ahead

        def accumulate(self, *arguments):
            calls.append(("compute", 0))
            return super().accumulate(*arguments)

        def update(self):
            calls.append(("update", 0))
            return super().update()

        def finish_update(self, number, norm):
            calls.append(("finish_update", number))
            return super().finish_update(number, norm)

    with patch.object(m2f.trainer.setup, "Engine", RecordingEngine):
        yield


def _comparable_result(job: TrainJob, seen: dict) -> dict:
    """Return the results of a run without times, memory use and paths."""
    folder = Path(job.run_folder)
    weights = sorted(folder.glob("checkpoints/*/*.safetensors"))
    seen["weights"] = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}
    lines = next(folder.glob("traces/*/rank_0000.jsonl")).read_text().splitlines()
    ignored = ("time", "seconds", "memory_gb")
    seen["trace"] = [{key: v for key, v in json.loads(line).items() if key not in ignored} for line in lines]
    seen["events"] = [[kind, step, message.replace(str(folder), "")] for kind, step, message in seen["events"]]
    return {key: seen[key] for key in ("losses", "checkpoints", "events", "state", "weights", "trace")}
