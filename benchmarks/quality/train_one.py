"""`python -m benchmarks.quality.train_one FOLDER SET ARM SEED ...`: train one run and record its CPU seconds."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.quality.arms import Run
    from m2f.cluster.recipe.config import RunConfig

# Functions import the other modules, because the rank's process repeats all imports at the top when it starts.


def main(folder: Path, run: Run, overrides: Sequence[str]) -> int:
    """Train until the end or a signal, and evaluate the last checkpoint. Return 0 if the run is finished, else 1.

    The CPU record of the run gets a line before and after, so that killed processes are detected. `training_s` is the
    CPU time of the rank's process, including its start; `evaluation_s` is that of this process.
    """
    config = run.config(folder, overrides)
    record = folder / "cpu" / f"{run.name}.jsonl"
    record.parent.mkdir(parents=True, exist_ok=True)
    _append_line(record, {"event": "start"})
    before = _cpu_seconds(resource.RUSAGE_SELF)
    try:
        finished = _train(run, config)
    finally:
        evaluation_s = _cpu_seconds(resource.RUSAGE_SELF) - before
        _append_line(
            record, {"event": "end", "training_s": _cpu_seconds(resource.RUSAGE_CHILDREN), "evaluation_s": evaluation_s}
        )
    return 0 if finished else 1


def _train(run: Run, config: RunConfig) -> bool:
    """Train and evaluate the run; return whether both are complete."""
    if run.arm.trainer == "transformers":
        from benchmarks.quality.transformers_run import train_transformers

        return train_transformers(config)
    from m2f.cluster.terminal import print_err
    from m2f.cluster.train.local import train_locally

    summary = train_locally(config)
    if failed := [entry.step for entry in summary.evaluations if entry.status == "failed"]:
        place = f"{summary.run_folder}/evaluations"
        print_err(f"evaluation of step {failed[-1]} failed; to repeat it, delete {place} and run again")
    return summary.status == "finished" and not failed


def _cpu_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _append_line(record: Path, line: dict[str, object]) -> None:
    with record.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def find_run(image_set: str, arm: str, seed: str) -> Run:
    """Return the run that these names from the command line select."""
    from benchmarks.quality.arms import ALL_ARMS, IMAGE_SETS, Run

    sets, arms = ({entry.name: entry for entry in table} for table in (IMAGE_SETS, ALL_ARMS))
    return Run(sets[image_set], arms[arm], int(seed))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), find_run(*sys.argv[2:5]), sys.argv[5:]))
