"""Small training jobs for `rank_main.py`, with reporters and controls for them. Not a test module."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path

from m2f.data_pipeline.config import DataConfig, LargeScaleJitter, MixtureItem
from m2f.model.config import (
    LossConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    TimmBackboneConfig,
)
from m2f.model.errors import UserError
from m2f.trainer.config import CheckpointConfig, OptimizerConfig, PolySchedule, TrainingConfig
from m2f.trainer.job import ManualControl, TrainJob
from m2f.trainer.reporting import CommitReport, Notice, StepReport
from m2f.trainer.worker import run_worker
from tests.waiting import PATIENCE_S

MODEL = ModelConfig(
    backbone=TimmBackboneConfig(name="resnet10t", norm="group", options={"channels": (8, 16, 24, 32)}),
    pixel_decoder=MSDeformAttnPixelDecoderConfig(
        conv_dim=16, mask_dim=16, num_layers=1, num_heads=2, num_points=2, feedforward_dim=16
    ),
    transformer_decoder=MaskedTransformerDecoderConfig(
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
        "precision": "fp32",
        "log_every_steps": 1,
        "optimizer": OptimizerConfig(lr=1e-3),
        "schedule": PolySchedule(),
        "checkpoint": CheckpointConfig(every_steps=3, keep=2),
        "collective_timeout_s": PATIENCE_S,
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
    """Reporter that collects losses, storage requests, committed steps and notices."""

    losses: dict[int, float] = field(default_factory=dict)
    requests: float = 0.0
    checkpoints: list[int] = field(default_factory=list)
    events: list[tuple[str, int, str]] = field(default_factory=list)

    def report(self, event):
        match event:
            case StepReport(step, metrics):
                self.losses[step] = metrics.loss.total
                self.requests += metrics.storage.requests
            case CommitReport(checkpoint):
                self.checkpoints.append(checkpoint.step)
            case Notice(kind, step, message):
                self.events.append((kind, step, message))


@dataclass
class KillAfterFirstCheckpoint(Recorder):
    """Kills this process at the first reported commit."""

    def report(self, event):
        if isinstance(event, CommitReport):
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class NoticeFileWriter(Recorder):
    """Appends each notice to a file immediately, so that notices survive the end of the process."""

    path: Path = Path()

    def report(self, event):
        if isinstance(event, Notice):
            with self.path.open("a") as file:
                file.write(json.dumps((event.kind, event.step, event.message)) + "\n")


@dataclass
class DrainAt(ManualControl):
    polls: int = 0

    def drain_requested(self) -> bool:
        self.polls -= 1
        return self.polls <= 0


@dataclass
class StopAt(ManualControl):
    polls: int = 0

    def stop_requested(self) -> bool:
        self.polls -= 1
        return self.polls <= 0


def train(job: TrainJob, reporter: Recorder | None = None, control: ManualControl | None = None) -> dict:
    reporter = reporter or Recorder()
    try:
        state = run_worker(job, reporter, control)
    except UserError as error:
        return {**asdict(reporter), "error": f"{type(error).__name__}: {error}"}
    return {**asdict(reporter), "state": asdict(state)}
