"""Scenarios of test_compiled_runs.py: complete runs with compiled regions, and the same without.

Not a test module; `rank_main.py` runs them on every rank.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

from torch._dynamo.testing import CompileCounterWithBackend

import m2f.trainer.loop
import m2f.trainer.setup
from m2f.trainer.config import OptimizerConfig
from m2f.trainer.engine.compile import compile_regions


def stopped_and_resumed(job, train, stop_at, backend: str, steps: int) -> dict:
    """Train an uncompiled run, and a compiled run that is stopped half-way and resumed.

    `job(name, **training)` returns a job with these training settings, `train(job, control=...)` the results of a run,
    and `stop_at(polls=...)` a control that stops it.
    """
    job = partial(job, max_steps=steps, optimizer=OptimizerConfig(lr=1e-4))
    with count_targets() as targets:
        eager = train(job("eager"))
    parts = job("parts", compile=True)
    with count_graphs(backend) as first:
        stopped = train(parts, control=stop_at(polls=steps // 2 + 1))
    with count_graphs(backend) as second:
        resumed = train(parts)
    graphs = [first.frame_count, second.frame_count]
    return {"eager": eager, "targets": targets, "stopped": stopped, "resumed": resumed, "graphs": graphs}


def whole_run_and_16_bit_runs(job, train, backend: str, steps: int) -> dict:
    """Train the compiled run without a stop, and four steps in each 16-bit precision, compiled and uncompiled."""
    job = partial(job, optimizer=OptimizerConfig(lr=1e-4))
    seen = {}
    with count_graphs(backend):
        seen["whole"] = train(job("whole", max_steps=steps, compile=True))
        for precision in ("bf16_autocast", "bf16"):
            for compiled in (False, True):
                name = f"{precision}{' compiled' if compiled else ''}"
                seen[name] = train(job(name, max_steps=4, precision=precision, compile=compiled))
    return seen


@contextmanager
def count_graphs(backend: str):
    """Compile regions with `backend`, and yield a counter of its graphs."""
    graphs = CompileCounterWithBackend(backend)
    m2f.trainer.setup.compile_regions = partial(compile_regions, backend=graphs)
    try:
        yield graphs
    finally:
        m2f.trainer.setup.compile_regions = compile_regions


@contextmanager
def count_targets():
    """Yield a list that receives the number of ground-truth masks in every micro-batch of this rank."""
    real, counts = m2f.trainer.loop.count_normalizers, []

    def count(targets, *rest):
        counts.append(int(targets.valid.sum()))
        return real(targets, *rest)

    m2f.trainer.loop.count_normalizers = count
    try:
        yield counts
    finally:
        m2f.trainer.loop.count_normalizers = real
