"""`python -m benchmarks [--tiny] [--device cuda] [NAME ...]`: ours and peers side by side, as one table."""

from __future__ import annotations

import argparse
from collections.abc import Callable

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
    bench_train_step,
    bench_zero,
    ceilings,
)
from benchmarks.measure import Row, report

ON_CPU: dict[str, Callable[[bool], list[Row]]] = {"data": bench_data.run, "eval": bench_eval.run}
ON_ANY_DEVICE: dict[str, Callable[[bool, torch.device], list[Row]]] = {
    "msda": bench_msda.run,
    "attention": bench_attention.run,
    "matcher": bench_matcher.run,
    "heads": bench_heads.run,
    "model": bench_model.run,
    "train_step": bench_train_step.run,
    "inference": bench_inference.run,
    "zero": bench_zero.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join([*ON_CPU, *ON_ANY_DEVICE])}; all if none")
    parser.add_argument("--tiny", action="store_true", help="small sizes, minutes on a laptop")
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu (one thread) or cuda")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {*ON_CPU, *ON_ANY_DEVICE}
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name, run in ON_CPU.items():
        if arguments.device.type == "cpu" and (not arguments.names or name in arguments.names):
            rows += run(arguments.tiny)
    for name, run_on in ON_ANY_DEVICE.items():
        if not arguments.names or name in arguments.names:
            rows += run_on(arguments.tiny, arguments.device)
    print(ceilings.describe(arguments.device, arguments.tiny))
    print(report(rows, arguments.device))


if __name__ == "__main__":
    main()
