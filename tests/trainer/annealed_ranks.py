"""Scenarios of test_annealed.py: EoMT runs, whose attention masks are dropped at random. Not a test module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from m2f.model.config import EomtDecoderConfig, TimmBackboneConfig, UpscalePixelDecoderConfig
from m2f.trainer.config import OptimizerConfig, StagedPolySchedule, ZeroConfig
from m2f.trainer.job import TrainJob
from tests.trainer.tiny_job import StopAt, make_job, train

PARTS = {
    "backbone": TimmBackboneConfig(
        name="vit_small_patch16_dinov3_qkvb",
        features="tokens",
        options={"embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 0.1},
    ),
    "pixel_decoder": UpscalePixelDecoderConfig(),
    "transformer_decoder": EomtDecoderConfig(num_queries=8, num_layers=2, annealing=((0, 5), (1, 7))),
}


def annealed(folder: Path, stage: str) -> dict:
    """Train five steps without a stop, and in another run that stops after one step and resumes."""
    whole, parts = (annealed_job(folder, f"{name}{stage}", stage, max_steps=5) for name in ("whole", "parts"))
    return {"whole": train(whole), "stopped": train(parts, control=StopAt(polls=2)), "resumed": train(parts)}


def annealed_again(folder: Path, name: str, stage: str) -> dict:
    """Train a sixth step of a run of `annealed`."""
    return train(annealed_job(folder, f"{name}{stage}", stage, max_steps=6))


def annealed_job(folder: Path, name: str, stage: str, max_steps: int) -> TrainJob:
    job = make_job(
        folder / f"annealed_{name}",
        str(folder / "shards"),
        max_steps=max_steps,
        optimizer=OptimizerConfig(lr=1e-3, layer_decay=0.8, layer_decay_from="top", decay_everything=True),
        # The backbone stays in warm-up, so its learning rates do not depend on max_steps.
        schedule=StagedPolySchedule(warmup_steps=2, backbone_warmup_steps=20),
        zero=ZeroConfig(stage=int(stage), param_persistence_threshold=0),
    )
    return replace(job, model=replace(job.model, **PARTS))
