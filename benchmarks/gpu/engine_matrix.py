"""Compare losses of ZeRO stages and precisions on one rank with plain AdamW, and losses before and after resuming."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.gpu.stage import Stage, Workload, describe_error, make_workload, small_model
from m2f.trainer.config import OptimizerConfig, Precision, TrainingConfig, ZeroConfig
from m2f.trainer.engine.compile import compile_regions
from m2f.trainer.engine.engine import Engine
from m2f.trainer.engine.param_groups import build_param_groups

STEPS_BEFORE_SAVE = 3
"""Number of steps before the state is saved."""
STEPS = STEPS_BEFORE_SAVE + 1
"""Number of steps. The resumed state makes the last one."""


@dataclass(frozen=True)
class Mode:
    """One combination of training settings."""

    stage: int
    precision: Precision
    offload: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        extras = ("offloaded",) * self.offload + ("compiled",) * self.compiled
        return " ".join((f"ZeRO-{self.stage} {self.precision}", *extras))


DRY_RUN_MODE = Mode(1, "fp32")
MODES = (
    DRY_RUN_MODE,
    Mode(0, "fp32"),
    Mode(1, "bf16_autocast"),
    Mode(1, "bf16"),
    Mode(1, "fp16"),
    Mode(1, "fp16_autocast"),
    Mode(2, "bf16_autocast"),
    Mode(3, "bf16_autocast"),
    Mode(1, "bf16_autocast", offload=True),
    Mode(1, "bf16_autocast", compiled=True),
)


def engine(stage: Stage) -> dict[str, object]:
    """Run every mode separately and return the differences of its losses. An error does not stop the other modes."""
    for name, text in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("DS_ACCELERATOR", stage.device.type)):
        os.environ.setdefault(name, text)
    dist.init_process_group(stage.pick("nccl", "gloo"), store=dist.HashStore(), rank=0, world_size=1)
    expected = _plain_losses(stage)
    rows: dict[str, object] = {}
    for mode in stage.pick(MODES, (DRY_RUN_MODE,)):
        try:
            rows[str(mode)] = _run_mode(mode, stage, expected)
        except Exception as error:
            traceback.print_exc()
            rows[str(mode)] = describe_error(error)
        print(mode, rows[str(mode)], flush=True)
    dist.destroy_process_group()
    return rows


def _workload(stage: Stage, precision: Precision) -> Workload:
    return make_workload(small_model(), 2, stage.pick(128, 64), precision, stage.device, objects=5)


def _plain_losses(stage: Stage) -> list[float]:
    """Return the losses of STEPS steps in fp32 without DeepSpeed."""
    workload = _workload(stage, "fp32")
    adamw = torch.optim.AdamW(build_param_groups(workload.module, OptimizerConfig()), fused=True)
    losses: list[float] = []
    for _ in range(STEPS):
        losses.append(float(workload.backward()))
        nn.utils.clip_grad_norm_(workload.module.parameters(), OptimizerConfig().clip_norm or float("inf"))
        adamw.step()
        adamw.zero_grad()
    return losses


def _run_mode(mode: Mode, stage: Stage, expected: list[float]) -> dict[str, object]:
    began = time.monotonic()
    engine, workload = _engine(mode, stage)
    losses: list[float] = []
    applied = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(STEPS):
            if number == STEPS_BEFORE_SAVE:
                engine.save(Path(folder), "saved")
            losses.append(float(engine.accumulate(workload.batch, workload.normalizers).total))
            applied += engine.finish_step(number + 1).applied
        resumed_engine, workload = _engine(mode, stage)
        resumed_engine.load(Path(folder), "saved")
        resumed_loss = float(resumed_engine.accumulate(workload.batch, workload.normalizers).total)
    max_error = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    return {
        "from plain fp32": f"{max_error:.0e}",
        "applied": applied,
        "resumed": f"{abs(resumed_loss - losses[STEPS_BEFORE_SAVE]) / abs(losses[STEPS_BEFORE_SAVE]):.0e}",
        "s": round(time.monotonic() - began, 1),
    }


def _engine(mode: Mode, stage: Stage) -> tuple[Engine, Workload]:
    workload = _workload(stage, mode.precision)
    if mode.compiled:
        compile_regions(workload.module.model)
    training = TrainingConfig(
        max_steps=STEPS,
        global_batch=2,
        micro_batch=2,
        precision=mode.precision,
        zero=ZeroConfig(stage=mode.stage, offload_optimizer=mode.offload),
    )
    normalizers = type(workload.normalizers)(*(value.cpu() for value in workload.normalizers))
    return Engine(workload.module, training, stage.device), workload._replace(normalizers=normalizers)
