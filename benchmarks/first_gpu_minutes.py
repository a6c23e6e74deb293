"""Checks and measurements for the first minutes on a GPU, in three calls of under ten minutes each.

    python -m benchmarks.first_gpu_minutes call 1|2|3 [--out FOLDER] [--recording FILE] [--dry-run]

Every step is a separate process with a time limit, so a step that fails or hangs does not delay the others beyond its
limit. FOLDER then contains results.jsonl with one line per started step, and log_N.txt with all output of call N. A
table is printed at the end. `step NAME` instead of `call N` runs one step in this process. A dry run uses the CPU and
small sizes, and skips steps that need a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
MIN_STEP_S = 15.0
"""Minimum time in seconds that must be left in a call to start another step."""
MAX_SHOWN_CHARACTERS = 400
"""Maximum number of characters of a finding in the table; results.jsonl contains the whole finding."""
State = Literal["ok", "skipped", "failed", "timeout", "no time"]


@dataclass(frozen=True)
class Step:
    """One check or measurement on the GPU."""

    name: str
    """Name of the step and of the function in `module` that runs it."""
    module: str
    """Name of a module in `benchmarks.gpu`."""
    seconds: float
    """Time limit in seconds."""


@dataclass(frozen=True)
class Call:
    """Steps that share one time slot on the GPU, in order of importance."""

    seconds: float
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Result:
    """Outcome of one step, as stored in results.jsonl."""

    step: str
    state: State
    seconds: float
    found: object
    """JSON-serialisable return value of the step, or an error or reason as text."""

    def line(self) -> str:
        """Return a line of the printed table."""
        return f"{self.step:<16} {self.state:<8} {self.seconds:5.0f} s  {json.dumps(self.found)[:MAX_SHOWN_CHARACTERS]}"


CALLS = {
    "1": Call(
        480,
        (
            Step("machine", "correctness", 90),
            Step("msda", "kernels", 150),
            Step("sdpa", "kernels", 60),
            Step("parity", "correctness", 90),
            Step("engine", "engine_matrix", 150),
            Step("graphs", "correctness", 60),
            Step("probe", "correctness", 45),
            Step("determinism", "correctness", 60),
        ),
    ),
    "2": Call(
        575,
        (
            Step("ceilings", "speed", 30),
            Step("bench_msda", "speed", 70),
            Step("first_step", "speed", 150),
            Step("step_b2", "speed", 90),
            Step("bench_train", "speed", 200),
            Step("bench_inference", "speed", 60),
            Step("bench_zero", "speed", 60),
            Step("profile", "speed", 80),
            Step("bench_rest", "speed", 60),
        ),
    ),
    "3": Call(
        510,
        (
            Step("train", "runs", 300),
            Step("rewrites", "rewrites", 200),
            Step("sanitizer", "runs", 100),
        ),
    ),
}
STEPS = {step.name: step for call in CALLS.values() for step in call.steps}


def run_call(number: str, arguments: Sequence[str], out: Path) -> list[Result]:
    """Run the steps of a call while time is left; print each result when the step ends."""
    call, began, results = CALLS[number], time.monotonic(), []
    for step in call.steps:
        remaining_s = call.seconds - (time.monotonic() - began)
        if remaining_s < MIN_STEP_S:
            result = Result(step.name, "no time", 0.0, None)
        else:
            result = _run_in_process(step, arguments, out, min(step.seconds, remaining_s), out / f"log_{number}.txt")
        results.append(result)
        print(result.line(), flush=True)
    return results


def _run_in_process(step: Step, arguments: Sequence[str], out: Path, limit_s: float, log: Path) -> Result:
    began, num_before = time.monotonic(), len(_read_results(out))
    with log.open("a", encoding="utf-8") as text:
        text.write(f"\n==== {step.name}\n")
        text.flush()
        process = subprocess.Popen(
            step_command(step, arguments), cwd=ROOT, stdout=text, stderr=text, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # kills the step and the processes that it started
            process.wait()
            result = Result(step.name, "timeout", time.monotonic() - began, f"stopped after {limit_s:.0f} s")
            _append_result(result, out)
            return result
    new_results = _read_results(out)[num_before:]
    if new_results:
        return new_results[-1]
    result = Result(step.name, "failed", time.monotonic() - began, f"exit status {status}, see {log.name}")
    _append_result(result, out)
    return result


def step_command(step: Step, arguments: Sequence[str]) -> list[str]:
    """Return the command that runs a step in the repository."""
    return [sys.executable, "-u", "-m", "benchmarks.first_gpu_minutes", "step", step.name, *arguments]


def run_step(step: Step, out: Path, recording: Path | None, dry: bool) -> Result:
    """Run one step in this process and append its result to results.jsonl."""
    began = time.monotonic()
    state: State = "ok"
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"  # must be set before triton is imported
    try:
        import torch

        from benchmarks.gpu.stage import Skipped, Stage

        stage = Stage(torch.device("cpu" if dry else "cuda"), out, recording)
        function = getattr(importlib.import_module(f"benchmarks.gpu.{step.module}"), step.name)
        try:
            found: object = function(stage)
        except Skipped as reason:
            state, found = "skipped", str(reason)
    except Exception as error:
        traceback.print_exc()
        state, found = "failed", f"{type(error).__name__}: {str(error)[:500]}"
    result = Result(step.name, state, round(time.monotonic() - began, 1), found)
    _append_result(result, out)
    return result


def _append_result(result: Result, out: Path) -> None:
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result), default=str) + "\n")


def _read_results(out: Path) -> list[Result]:
    file = out / "results.jsonl"
    if not file.is_file():
        return []
    return [Result(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a call or a step; return exit status 1 if a step failed or, in a call, exceeded its time limit."""
    parser = argparse.ArgumentParser(prog="first_gpu_minutes", allow_abbrev=False)
    parser.add_argument("kind", choices=("call", "step"))
    parser.add_argument("name", choices=(*CALLS, *STEPS), metavar="NAME", help="call (1, 2 or 3) or name of a step")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for results; default runs/gpu")
    parser.add_argument("--recording", type=Path, help="file of benchmarks.record_batches, for the step `train`")
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU with small sizes")
    arguments = parser.parse_args(argv)
    if (arguments.kind == "call") != (arguments.name in CALLS):
        parser.error(f"{arguments.name} is not a {arguments.kind}")
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    recording = None if arguments.recording is None else arguments.recording.absolute()
    if arguments.kind == "step":
        result = run_step(STEPS[arguments.name], out, recording, arguments.dry_run)
        print(result.line())
        return int(result.state == "failed")
    options = ["--out", str(out), *([] if recording is None else ["--recording", str(recording)])]
    results = run_call(arguments.name, [*options, *(["--dry-run"] if arguments.dry_run else [])], out)
    print("\n".join(["", *(result.line() for result in results)]))
    return int(any(result.state in ("failed", "timeout") for result in results))


if __name__ == "__main__":
    sys.exit(main())
