"""`python -m benchmarks.quality.run_arms FOLDER`: train arms with several seeds, each run in a process on one core.

On an interrupt, runs stop after a checkpoint. The same command continues with the unfinished runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.arms import ALL_ARMS, ARMS, IMAGE_SETS, Run, list_runs
from benchmarks.quality.finished_runs import read_run
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.terminal import print_out
from m2f.cluster.train.signals import handling_signals
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.storage.storage import Storage

POLL_S = 2.0
"""Pause in seconds between two checks of the running processes, which take minutes."""
_ONE_CORE = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def main(argv: Sequence[str] | None = None) -> int:
    """Train the requested runs; return exit status 0 if all are finished, else 1."""
    arguments = parse(argv)
    folder = arguments.folder.absolute()
    sets = [image_set for image_set in IMAGE_SETS if image_set.name in arguments.sets]
    arms = [arm for arm in ALL_ARMS if arm.name in arguments.arms]
    pool = Pool(folder, arguments.overrides, arguments.processes, arguments.kept)
    return pool.train(list_runs(sets, arms, arguments.seeds), 60 * arguments.minutes)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line, with defaults; None parses `sys.argv`."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality.run_arms", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder for shards, runs, logs and CPU records")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="section.key=value", help="settings for all runs")
    parser.add_argument("--sets", nargs="+", choices=[image_set.name for image_set in IMAGE_SETS], default=["shapes"])
    names = [arm.name for arm in ALL_ARMS]
    m2f_arms = [arm.name for arm in ARMS if arm.trainer == "m2f"]
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=names,
        default=m2f_arms,
        help="default: arms of m2f with the recipe's number of steps",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument(
        "--kept", type=Path, nargs="*", default=[], metavar="DIR", help="skip runs whose results are in these folders"
    )
    parser.add_argument("--processes", type=int, default=1, help="maximum number of parallel runs")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="time limit, after which all runs stop after a checkpoint"
    )
    return parser.parse_args(argv)


def make_shards(config: RunConfig) -> None:
    """Write the shards of all data sets in this process; existing shards are kept."""
    for dataset in config.datasets.values():
        assert dataset.source is not None
        write_dataset(open_reader(dataset.source), dataset, Storage())


class Pool:
    """Runs training processes, at most `processes` at a time."""

    def __init__(self, folder: Path, overrides: Sequence[str], processes: int, kept: Sequence[Path] = ()) -> None:
        self._folder, self._overrides, self._processes = folder, overrides, processes
        self._results = (folder, *kept)
        self._running: dict[Run, subprocess.Popen[bytes]] = {}
        self._stopped = False

    def train(self, runs: Sequence[Run], seconds: float) -> int:
        """Train the unfinished runs in order; return 0 if all are finished, else 1.

        On SIGINT, on SIGTERM, after `seconds` and after an error, all processes stop after a checkpoint.
        """
        pending = [run for run in runs if not self._is_finished(run)]
        print_out(f"{len(pending)} of {len(runs)} runs to train")
        deadline = time.monotonic() + seconds
        with handling_signals(lambda _: self._stop()):
            try:
                while self._running or (pending and not self._stopped):
                    if time.monotonic() > deadline:
                        self._stop()
                    while pending and not self._stopped and len(self._running) < self._processes:
                        self._start(pending.pop(0))
                    self._collect()
                    time.sleep(POLL_S)
            finally:
                self._stop()  # after an error, for example while writing shards
        missing = [run.name for run in runs if not self._is_finished(run)]
        print_out(f"not finished: {', '.join(missing)}" if missing else "all runs are finished")
        return 1 if missing else 0

    def _is_finished(self, run: Run) -> bool:
        last_step = run.config(self._folder, self._overrides).training.max_steps
        result = read_run(self._results, run)
        return result is not None and result.step == last_step

    def _start(self, run: Run) -> None:
        make_shards(run.config(self._folder, self._overrides))
        log = self._folder / "logs" / f"{run.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        words = [str(self._folder), run.image_set.name, run.arm.name, str(run.seed), *self._overrides]
        command = [sys.executable, "-m", "benchmarks.quality.train_one", *words]
        with log.open("ab") as output:
            self._running[run] = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | _ONE_CORE,
                start_new_session=True,  # Ctrl-C must reach only this process, which sends one SIGTERM to each run
            )
        print_out(f"{run.name}: started, log {log}")

    def _collect(self) -> None:
        for run, process in list(self._running.items()):
            if process.poll() is not None:
                del self._running[run]
                outcome = "finished" if self._is_finished(run) else f"ended with status {process.returncode}"
                print_out(f"{run.name}: {outcome}")

    def _stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            for process in self._running.values():
                process.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
