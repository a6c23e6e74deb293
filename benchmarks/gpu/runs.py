"""Steps that stop and resume a training run, and run the kernels under NVIDIA's memory checker."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.gpu.stage import Skipped, Stage

TRAIN_S, SHUTDOWN_S = 75.0, 60.0
"""Seconds until a part of the run is stopped, and seconds that it then has to save its checkpoint."""
WARM_UP = 5
"""Number of first steps of a part that do not count in the mean time of a step."""


def train(stage: Stage) -> dict[str, object]:
    """Train one run from recorded batches in two parts. Each part gets SIGTERM after TRAIN_S seconds if it still runs.

    The traces of both parts, and the final weights in half precision, are copied to the results.
    """
    if stage.recording is None:
        raise Skipped("needs --recording FILE, written by `python -m benchmarks.record_batches RECIPE FILE`")
    with tempfile.TemporaryDirectory(prefix="m2f-gpu-run-") as runs:
        return _train_in(Path(runs), stage, stage.recording)


def _train_in(runs: Path, stage: Stage, recording: Path) -> dict[str, object]:
    settings = (
        f"output={runs}",
        "name=gpu",
        "cluster.num_workers=1",
        f"cluster.num_gpus_per_worker={stage.pick(1, 0)}",
        f"training.precision={stage.pick('bf16_autocast', 'fp32')}",
        f"training.checkpoint.every_steps={stage.pick(200, 2)}",
        f"training.log_every_steps={stage.pick(25, 1)}",
    )
    command = [sys.executable, "-m", "benchmarks.train_recorded", str(recording), *settings]
    statuses = [_run_part(command), _run_part(command)]
    traces = sorted((runs / "gpu" / "traces").glob("*/rank_0000.jsonl"), key=lambda path: path.stat().st_mtime)
    for number, trace in enumerate(traces, start=1):
        shutil.copy(trace, stage.out / f"trace_part_{number}.jsonl")
    _save_half_weights(runs / "gpu" / "checkpoints", stage.out / "weights_half.safetensors")
    return {"exit statuses": statuses, "parts": [_summary(trace) for trace in traces]}


def _run_part(command: list[str]) -> int:
    process = subprocess.Popen(command)
    try:
        return process.wait(TRAIN_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        return process.wait(SHUTDOWN_S)


def _summary(trace: Path) -> dict[str, object]:
    """Return first and last step, their losses, and the mean time of a step."""
    steps = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    if not steps:
        return {"steps": 0}
    timed = steps[WARM_UP:] or steps
    return {
        "steps": (steps[0]["step"], steps[-1]["step"]),
        "losses": (steps[0]["loss_share"], steps[-1]["loss_share"]),
        "step s": round(sum(sum(step["seconds"].values()) for step in timed) / len(timed), 4),
    }


def _save_half_weights(checkpoints: Path, target: Path) -> None:
    """Write the weights of the newest checkpoint to `target` in half precision, so that the file is small."""
    newest = sorted(checkpoints.glob("*/weights.safetensors"))[-1:]
    for path in newest:
        tensors = load_file(path)
        save_file({name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}, target)


def sanitizer(stage: Stage) -> list[str]:
    """Run the kernels of deformable attention with compute-sanitizer, which checks every memory access."""
    stage.need_gpu()
    if shutil.which("compute-sanitizer") is None:
        raise Skipped("needs compute-sanitizer from the CUDA toolkit")
    command = ["compute-sanitizer", "--tool", "memcheck", sys.executable, "-m", "benchmarks.gpu.runs"]
    completed = subprocess.run(command, capture_output=True, text=True)
    print(completed.stdout[-3000:], completed.stderr[-1000:], flush=True)
    return [line for line in completed.stdout.splitlines() if "ERROR SUMMARY" in line or "accepted" in line]


def run_kernels() -> None:
    """Run the kernels. Called in the process that compute-sanitizer checks."""
    from m2f.model.deform_attn.module import _checked_kernel

    print("accepted", _checked_kernel(torch.bfloat16, 3, 8, 4, 32), _checked_kernel(torch.float32, 3, 4, 4, 24))


if __name__ == "__main__":
    run_kernels()
