"""`python -m benchmarks.gpu.first_step DEVICE FOLDER`: print the seconds of the first compiled training step.

FOLDER is the output folder of `benchmarks.first_gpu_minutes`, which contains the cache of compiled code.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.stage import Stage, compile_workload, make_workload, training_step


def main(device: str, folder: str) -> None:
    """Compile the model and run one step of 2 images; print the seconds of both, without building the model."""
    stage = Stage(torch.device(device), Path(folder))
    workload = make_workload(stage.config, 2, stage.pick(1024, 64), stage.precision, stage.device)
    compile_workload(workload, stage)
    step = training_step(workload)
    began = time.perf_counter()
    step()
    if not stage.dry:
        torch.accelerator.synchronize()
    print(round(time.perf_counter() - began, 1))


if __name__ == "__main__":
    main(*sys.argv[1:])
