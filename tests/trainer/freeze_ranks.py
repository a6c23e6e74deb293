"""Scenarios of test_freeze.py: runs with a frozen backbone. Not a test module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
