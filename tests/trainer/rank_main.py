"""One rank of a test: `python rank_main.py SCENARIO FOLDER` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.

Scenarios write what they saw to FOLDER as `SCENARIO.rank_R.json`; test functions look at it. Not a test module.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_pipeline.config import DataConfig, LargeScaleJitter, MixtureItem
from model.config import (
    LossConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    TimmBackboneConfig,
    TransformerDecoderConfig,
)
from trainer.config import CheckpointConfig, OptimizerConfig, PolySchedule, TrainingConfig, ZeroConfig
from trainer.job import ManualControl, TrainJob

MODEL = ModelConfig(
    backbone=TimmBackboneConfig(name="resnet10t", norm="group", options={"channels": (8, 16, 24, 32)}),
    pixel_decoder=MSDeformAttnPixelDecoderConfig(
        conv_dim=16, mask_dim=16, num_layers=1, num_heads=2, num_points=2, feedforward_dim=16
    ),
    transformer_decoder=TransformerDecoderConfig(
        num_queries=8, num_layers=2, hidden_dim=16, num_heads=2, feedforward_dim=16
    ),
    loss=LossConfig(num_points=64),
    num_classes=10,
)


def make_job(run_folder: Path, shards: str, **training) -> TrainJob:
    settings = {
        "max_steps": 8,
        "global_batch": 4,
        "micro_batch": 2,
        "log_every_steps": 1,
        "optimizer": OptimizerConfig(lr=1e-3),
        "schedule": PolySchedule(),
        "checkpoint": CheckpointConfig(every_steps=3, keep=2),
        "collective_timeout_s": 60.0,
        **training,
    }
    return TrainJob(
        run_folder=str(run_folder),
        model=MODEL,
        data=DataConfig(train=(MixtureItem(dataset="train"),), augment=LargeScaleJitter(size=64), workers=0),
        shards=(shards,),
        training=TrainingConfig(**settings),
        seed=3,
        recipe="name: test\n",
    )


@dataclass
class Recorder:
    """Reporter that remembers everything."""

    losses: dict[int, float] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    events: list[tuple[str, int, str]] = field(default_factory=list)

    def metrics(self, step, values):
        self.losses[step] = values["loss/total"]

    def checkpoint(self, checkpoint):
        self.checkpoints.append(checkpoint.step)

    def event(self, kind, step, message):
        self.events.append((kind, step, message))
