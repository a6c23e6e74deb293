"""`python -m benchmarks [--tiny] [--device cuda] [--save FOLDER] [NAME ...]`: compare our code with peers."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

from benchmarks import ceilings
from benchmarks.measure import Measurement
from benchmarks.tables import Setting, json_lines, markdown, save

CPU_ONLY = ("data", "eval")
ON_ANY_DEVICE = (
    "msda",
    "attention",
    "matcher",
    "heads",
    "model",
    "train_step",
    "eomt",
    "frozen",
    "inference",
    "postproc",
    "zero",
)
"""Names of the benchmarks that run on any device. NAME selects the function `run` of `benchmarks.peers.bench_NAME`."""


def run(name: str, tiny: bool, device: torch.device) -> list[Measurement]:
    """Import and run one benchmark. Only the packages that this benchmark needs must be installed."""
    benchmark = importlib.import_module(f"benchmarks.peers.bench_{name}").run
    return benchmark(tiny) if name in CPU_ONLY else benchmark(tiny, device=device)


def main() -> None:
    """Run the benchmarks that the command line names, and print their results even if a later one fails."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join([*CPU_ONLY, *ON_ANY_DEVICE])}; default all"
    )
    parser.add_argument("--tiny", action="store_true", help="use small sizes; takes minutes on a laptop")
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu (one thread) or cuda")
    parser.add_argument("--save", metavar="FOLDER", type=Path, help="also write DAY_HARDWARE.md and .jsonl to FOLDER")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {*CPU_ONLY, *ON_ANY_DEVICE}
    if unknown:
        parser.error(f"unknown benchmarks: {', '.join(sorted(unknown))}")
    if arguments.device.type != "cpu" and (only := [name for name in CPU_ONLY if name in arguments.names]):
        parser.error(f"--device is {arguments.device}; omit the benchmarks that only a CPU runs: {', '.join(only)}")
    torch.set_num_threads(1)
    setting = Setting.now(arguments.device, ceilings.describe(arguments.device, arguments.tiny))
    benchmarks = (CPU_ONLY if arguments.device.type == "cpu" else ()) + ON_ANY_DEVICE
    selected = [name for name in benchmarks if not arguments.names or name in arguments.names]
    results: list[Measurement] = []
    try:
        for number, name in enumerate(selected, start=1):
            began = time.monotonic()
            results += run(name, arguments.tiny, arguments.device)
            print(f"{number}/{len(selected)} {name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    finally:  # keeps the results that were measured before a failure
        print(f"{markdown(results, setting)}\n\n{json_lines(results, setting)}")
        if arguments.save is not None:
            print(f"\nwrote {save(results, setting, arguments.save)}")


if __name__ == "__main__":
    main()
