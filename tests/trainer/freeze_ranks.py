"""Scenarios of test_freeze.py: runs and steps with a frozen backbone. Not a test module."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from m2f.data_pipeline.order.order import step_positions
from m2f.model.config import TimmBackboneConfig, UpscalePixelDecoderConfig
from m2f.model.segmenter import Segmenter
from m2f.trainer.config import CheckpointConfig, OptimizerConfig, ZeroConfig
from m2f.trainer.engine.engine import Engine
from m2f.trainer.engine.queued_step import loss_terms
from m2f.trainer.job import TrainJob
from m2f.trainer.ranks import Ranks
from m2f.trainer.telemetry.metrics import sum_over_ranks
from tests.trainer.engine_ranks import GLOBAL_BATCH, fresh_module, make_images, normalizers_of
from tests.trainer.family_ranks import HEADS, VIT, VIT_ADAPTER
from tests.trainer.tiny_job import MODEL, StopAt, make_job, train
from tests.waiting import PATIENCE_S

FROZEN = replace(MODEL, backbone=replace(MODEL.backbone, norm="native"), freeze=("backbone",))
"""Uses native BatchNorms, whose statistics would change in training if they were not frozen."""
DINOV3 = TimmBackboneConfig(name="vit_small_patch16_dinov3_qkvb", features="tokens", options=VIT)
FROZEN_VITS = {
    "pmt": replace(
        MODEL,
        backbone=DINOV3,
        pixel_decoder=UpscalePixelDecoderConfig(),
        transformer_decoder=HEADS["pmt"],
        freeze=("backbone",),
    ),
    "vit_adapter": replace(MODEL, backbone=VIT_ADAPTER, freeze=("backbone.vit",)),
}
"""Heads above a frozen vision transformer, which is the only frozen part."""


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


def frozen_vit(folder: Path, head: str) -> dict:
    """Make two steps of a member of `FROZEN_VITS` in every ZeRO stage."""
    zeros = (ZeroConfig(stage=stage, param_persistence_threshold=0) for stage in range(4))
    jobs = (make_job(folder, "none", zero=zero) for zero in zeros)
    return {job.training.zero.stage: _steps(replace(job, model=FROZEN_VITS[head])) for job in jobs}


def _steps(job: TrainJob) -> dict:
    """Return the losses, the names of changed frozen and unchanged trained tensors, and counts of elements.

    The names are those that rank 0 sees.
    """
    ranks, module = Ranks(PATIENCE_S), fresh_module(job)
    (part,) = job.model.freeze
    start = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
    engine, losses = Engine(module, job.training, torch.device("cpu")), []
    for step in range(2):
        plan = step_positions(step, GLOBAL_BATCH, ranks.rank, ranks.world_size, job.training.micro_batch)
        batches = [make_images(job.model, positions) for positions in plan]
        normalizers = normalizers_of(job, batches, ranks)
        found = [engine.accumulate(batch, normalizers) for batch in batches]
        assert engine.finish_step(step + 1).applied
        losses.append(sum_over_ranks(loss_terms(found), ranks).total)
    weights = engine.weights() | engine.weights(frozen=True)
    same = {name for name, tensor in weights.items() if torch.equal(tensor, start[name])}
    frozen = {name for name in start if name.startswith(f"{part}.")}
    in_optimizer = sum(state["exp_avg"].numel() for state in engine._adamw.state.values())
    return {
        "losses": losses,
        "changed": sorted(frozen - same),
        "kept": sorted(same - frozen),
        "trained_elements": sum(count for count, is_trained in counts if is_trained),
        "frozen_elements": sum(count for count, is_trained in counts if not is_trained),
        "optimizer_elements": int(ranks.sum(torch.tensor([in_optimizer], dtype=torch.float64))),
    }
