"""`python -m benchmarks [--tiny]`: every benchmark in turn, as one table."""

from __future__ import annotations

import argparse

import torch

from benchmarks import bench_data, bench_eval, bench_model, bench_msda
from benchmarks.measure import report


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small sizes, minutes on a laptop")
    tiny = parser.parse_args().tiny
    torch.set_num_threads(1)
    print(
        report([row for benchmark in (bench_data, bench_eval, bench_msda, bench_model) for row in benchmark.run(tiny)])
    )


if __name__ == "__main__":
    main()
