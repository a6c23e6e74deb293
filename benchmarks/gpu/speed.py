"""Steps that measure the speed of this GPU and of the model: benchmarks, and a profile of a training step."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from benchmarks import ceilings as device_ceilings
from benchmarks.gpu.stage import (
    Stage,
    Workload,
    compile_workload,
    describe_error,
    make_workload,
    milliseconds,
    training_step,
)
from benchmarks.measure import Measurement
from benchmarks.tables import Setting, json_lines

TRAIN_COMPARISONS = (
    *((8, "against_transformers"), (2, "against_transformers"), (8, "against_official_order")),
    *((8, "without_matching"), (8, "against_compiled_transformers")),
)
"""Batch size and comparison of each measurement of the training step, the most important first."""
NUM_SLOWEST = 12
"""Number of kernels in the list of the slowest ones."""


def ceilings(stage: Stage) -> str:
    """Measure the peak rates of the device and return them in one line."""
    return device_ceilings.describe(stage.device, tiny=stage.dry)


def bench_msda(stage: Stage) -> list[str]:
    """Compare deformable attention with `grid_sample`."""
    return _run_benchmarks(stage, ("msda",))


def bench_train(stage: Stage) -> list[str]:
    """Compare the training step with `transformers`, with the official order, and with itself without matching.

    An error in one comparison does not stop the others.
    """
    stage.need_gpu()
    from benchmarks.peers.bench_train_step import _Case

    torch.backends.cudnn.allow_tf32 = False  # TF32 would break the required agreement of the logits to 1e-3
    results: list[Measurement] = []
    lines: list[str] = []
    for images, comparison in TRAIN_COMPARISONS:
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        try:
            results.append(getattr(_Case(images, 1024, stage.device, repeats=10), comparison)())
            lines.append(_line(results[-1]))
        except Exception as error:
            traceback.print_exc()
            lines.append(f"{images} images {comparison}: {describe_error(error)}")
        print(lines[-1], flush=True)
    _append_rows(stage, results)
    return lines


def bench_inference(stage: Stage) -> list[str]:
    """Compare inference of the R50 model with `transformers`."""
    stage.need_gpu()
    return _run_benchmarks(stage, ("inference",))


def bench_zero(stage: Stage) -> list[str]:
    """Measure the overhead of DeepSpeed."""
    return _run_benchmarks(stage, ("zero",), tiny=True)


def bench_rest(stage: Stage) -> list[str]:
    """Measure the parts of the model separately."""
    stage.need_gpu()
    return _run_benchmarks(stage, ("attention", "heads", "matcher", "postproc"), tiny=True)


def first_step(stage: Stage) -> dict[str, object]:
    """Measure the seconds until the first compiled step of 2 images has ended, without and with cached code.

    Each measurement is a process, because a process also caches in memory. Later steps use the same cache.
    """
    shutil.rmtree(stage.compile_cache, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.gpu.first_step", str(stage.device), str(stage.out)]
    facts: dict[str, object] = {}
    for name in ("cold s", "warm s"):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        facts[name] = float(done.stdout.splitlines()[-1])
    return facts


def step_b2(stage: Stage) -> dict[str, object]:
    """Measure a step of the R50 COCO panoptic model with 2 images per GPU, uncompiled and compiled.

    Each entry has its time by CUDA events and the time that the host needs to queue it, in milliseconds, and its peak
    memory in 10^9 bytes. A dry run has only the time.
    """
    return {name: _step_facts(workload, stage) for name, workload in _workloads(stage, ((2, False), (2, True)))}


def _step_facts(workload: Workload, stage: Stage) -> dict[str, float]:
    step = training_step(workload)
    facts = {"step ms": milliseconds(step, stage.device)}
    if stage.dry:
        return facts
    torch.cuda.reset_peak_memory_stats()
    queued: list[float] = []
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        queued.append(1e3 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    return facts | {"host ms": sorted(queued)[5], "peak GB": torch.cuda.max_memory_allocated() / 1e9}


def _workloads(stage: Stage, variants: Sequence[tuple[int, bool]]) -> Iterator[tuple[str, Workload]]:
    """Yield a name and a workload for each number of images, and whether the model is compiled."""
    for images, is_compiled in variants:
        workload = make_workload(stage.config, images, stage.pick(1024, 64), stage.precision, stage.device)
        if is_compiled:
            compile_workload(workload, stage)
        yield f"{images} images{', compiled' if is_compiled else ''}", workload


def profile(stage: Stage) -> dict[str, object]:
    """Profile a step with 2 images, also compiled, and with 8 images; return times and slowest kernels.

    Writes the traces of 2 images to `out`.
    """
    activities = [ProfilerActivity.CPU, *stage.pick([ProfilerActivity.CUDA], [])]
    facts: dict[str, object] = {}
    for name, workload in _workloads(stage, stage.pick(((2, False), (2, True), (8, False)), ((1, False),))):
        step = training_step(workload)
        step()
        step()
        with profiler(activities=activities) as profiled:
            began = time.perf_counter()
            step()
            torch.accelerator.synchronize() if not stage.dry else None
            wall = 1e3 * (time.perf_counter() - began)
        events = profiled.key_averages()
        order = stage.pick("self_device_time_total", "self_cpu_time_total")
        print(f"{name}\n{events.table(sort_by=order, row_limit=45, max_name_column_width=90)}", flush=True)
        kernels = sorted(
            (event for event in events if event.device_type.name == "CUDA"), key=lambda e: -e.self_device_time_total
        )
        facts[name] = {
            "wall ms": round(wall, 1),
            "kernels": sum(event.count for event in kernels),
            "busy ms": round(sum(event.self_device_time_total for event in kernels) / 1e3, 1),
            "slowest": [f"{e.key[:60]} {e.self_device_time_total / 1e3:.2f} ms" for e in kernels[:NUM_SLOWEST]],
        }
        if name.startswith("2 images"):
            profiled.export_chrome_trace(str(stage.out / f"trace_{name.replace(', ', '_').replace(' ', '_')}.json.gz"))
    return facts


def _run_benchmarks(stage: Stage, names: Sequence[str], tiny: bool = False) -> list[str]:
    """Run some benchmarks and return their lines; raise the first error after all have run."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    results: list[Measurement] = []
    errors: list[Exception] = []
    for name in names:
        try:
            results += importlib.import_module(f"benchmarks.peers.bench_{name}").run(tiny or stage.dry, stage.device)
        except Exception as error:
            traceback.print_exc()
            errors.append(error)
    _append_rows(stage, results)
    print("\n".join(map(_line, results)), flush=True)
    if errors:
        raise errors[0]
    return [_line(result) for result in results]


def _append_rows(stage: Stage, results: Sequence[Measurement]) -> None:
    """Append the measurements to rows.jsonl in the output folder."""
    with (stage.out / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json_lines(results, Setting.now(stage.device, "")) + "\n")


def _line(result: Measurement) -> str:
    memory = (
        "" if result.ours_gb is None or result.peer_gb is None else f", {result.ours_gb:.2f} of {result.peer_gb:.2f} GB"
    )
    floor = "" if result.floor_share is None else f", {result.floor_share:.0%} floor"
    waits = "" if result.ours_waits is None else f", {result.ours_waits} of {result.peer_waits} waits"
    times = f"{result.ours.median:.2f} ms, {result.ratio:.2f} x {result.peer}"
    return f"{result.case} {result.shape}: {times}{memory}{floor}{waits}"
