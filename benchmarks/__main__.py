"""`python -m benchmarks [--tiny] [--device cuda] [--save FOLDER] [NAME ...]`: ours and peers side by side."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks import (
    bench_attention,
    bench_data,
    bench_eval,
    bench_heads,
    bench_inference,
    bench_matcher,
    bench_model,
    bench_msda,
    bench_postproc,
    bench_train_step,
    bench_zero,
    ceilings,
)
from benchmarks.measure import Measurement
from benchmarks.tables import Setting, json_lines, markdown, save

ON_CPU: dict[str, Callable[[bool], list[Measurement]]] = {"data": bench_data.run, "eval": bench_eval.run}
ON_ANY_DEVICE: dict[str, Callable[[bool, torch.device], list[Measurement]]] = {
    "msda": bench_msda.run,
    "attention": bench_attention.run,
    "matcher": bench_matcher.run,
    "heads": bench_heads.run,
    "model": bench_model.run,
    "train_step": bench_train_step.run,
    "inference": bench_inference.run,
    "postproc": bench_postproc.run,
    "zero": bench_zero.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join([*ON_CPU, *ON_ANY_DEVICE])}; all if none")
    parser.add_argument("--tiny", action="store_true", help="small sizes, minutes on a laptop")
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu (one thread) or cuda")
    parser.add_argument("--save", metavar="FOLDER", type=Path, help="also write DAY_HARDWARE.md and .jsonl there")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {*ON_CPU, *ON_ANY_DEVICE}
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    setting = Setting.now(arguments.device, ceilings.describe(arguments.device, arguments.tiny))
    benchmarks = dict(ON_CPU) if arguments.device.type == "cpu" else {}
    benchmarks |= {name: partial(run, device=arguments.device) for name, run in ON_ANY_DEVICE.items()}
    wanted = [name for name in benchmarks if not arguments.names or name in arguments.names]
    results: list[Measurement] = []
    try:
        for number, name in enumerate(wanted, start=1):
            began = time.monotonic()
            results += benchmarks[name](arguments.tiny)
            print(f"{number}/{len(wanted)} {name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    finally:  # what was measured before a failure stays
        print(f"{markdown(results, setting)}\n\n{json_lines(results, setting)}")
        if arguments.save is not None:
            print(f"\nwritten: {save(results, setting, arguments.save)}")


if __name__ == "__main__":
    main()
