"""Scenarios of test_freeze.py: runs with a frozen backbone. Not a test module."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from m2f.model.segmenter import Segmenter
from m2f.trainer.config import CheckpointConfig, OptimizerConfig, ZeroConfig
from m2f.trainer.job import TrainJob
from tests.trainer.tiny_job import MODEL, StopAt, make_job, train

FROZEN = replace(MODEL, backbone=replace(MODEL.backbone, norm="native"), freeze=("backbone",))
"""Uses native BatchNorms, whose statistics would change in training if they were not frozen."""


def frozen_job(folder: Path, name: str, stage: int, steps: int = 4) -> TrainJob:
    job = make_job(
        folder / f"{name}_{stage}",
        str(folder / "shards"),
        max_steps=steps,
        zero=ZeroConfig(stage=stage, param_persistence_threshold=100),
        optimizer=OptimizerConfig(lr=1e-3, layer_decay=0.9),
        checkpoint=CheckpointConfig(every_steps=2, keep=9),
        ema_decay=0.9,
    )
    return replace(job, model=FROZEN)


def frozen(folder: Path, stage: str) -> dict:
    """Train one run without a stop, and one that stops after two steps and resumes."""
    whole = train(frozen_job(folder, "whole", int(stage)))
    stopped = train(frozen_job(folder, "stopped", int(stage)), control=StopAt(polls=3))
    return {"whole": whole, "stopped": stopped, "resumed": train(frozen_job(folder, "stopped", int(stage)))}


def frozen_alone(folder: Path, stage: str) -> dict:
    """Continue the second run of `frozen`; the test starts it on another number of ranks."""
    return train(frozen_job(folder, "stopped", int(stage), steps=6))


def frozen_old(folder: Path, stage: str) -> dict:
    """Resume a run whose first checkpoint stores frozen weights as earlier versions did."""
    with patch.object(Segmenter, "frozen_names", lambda self: frozenset()):
        stopped = train(frozen_job(folder, "old", int(stage)), control=StopAt(polls=3))
    return {"stopped": stopped, "resumed": train(frozen_job(folder, "old", int(stage)))}


def frozen_damaged(folder: Path, stage: str) -> dict:
    """Resume a copy of the first run of `frozen` after damage to the frozen weights of its newest checkpoint."""
    if dist.get_rank() == 0:
        shutil.copytree(folder / f"whole_{stage}", folder / f"damaged_{stage}")
        newest = max((folder / f"damaged_{stage}" / "checkpoints").iterdir())
        path = next(newest.glob("frozen-*"))
        path.write_bytes(bytes(1) + path.read_bytes()[1:])
    dist.barrier()
    return train(frozen_job(folder, "damaged", int(stage)))
