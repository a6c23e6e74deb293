"""What DeepSpeed costs: a ZeRO-1 step of one rank against the same step with plain AdamW."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.measure import Row, compare
from benchmarks.scenes import make_batch
from benchmarks.transformers_peer import CONFIG
from model.criterion import count_normalizers
from model.mask2former import build_model
from trainer.config import OptimizerConfig, TrainingConfig, ZeroConfig
from trainer.engine import Engine
from trainer.module import TrainingModule
from trainer.param_groups import build_param_groups

CLIP_NORM = 0.01


def run(tiny: bool, device: torch.device) -> list[Row]:
    """The R50 model with a batch of 2."""
    for variable, text in (("DS_ACCELERATOR", device.type), ("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(variable, text)
    store = dist.HashStore()
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl", store=store, rank=0, world_size=1)
    try:
        size = 1024 if device.type != "cpu" else 128 if tiny else 512
        return [_case(2, size, device, repeats=3 if device.type == "cpu" else 20)]
    finally:
        dist.destroy_process_group()


def _case(images: int, size: int, device: torch.device, repeats: int) -> Row:
    precision = "fp32" if device.type == "cpu" else "bf16_autocast"
    torch.manual_seed(0)
    plain = TrainingModule(build_model(CONFIG, pretrained_backbone=False), CONFIG, 0, precision).to(device)
    # So small a rate that all repetitions see the same weights.
    optimizer = OptimizerConfig(lr=1e-12, clip_norm=CLIP_NORM)
    training = TrainingConfig(
        max_steps=1,
        global_batch=images,
        micro_batch=images,
        precision=precision,
        optimizer=optimizer,
        zero=ZeroConfig(stage=1),
    )
    engine = Engine(deepcopy(plain), training, device)
    adamw = torch.optim.AdamW(build_param_groups(plain.model, optimizer), fused=True)
    batch = make_batch(images, size, objects=10).to(device)
    normalizers = count_normalizers(batch.targets, CONFIG.transformer_decoder.num_queries, CONFIG.loss)
    normalizers = type(normalizers)(*(value.cpu() for value in normalizers))

    def sharded_step() -> Sequence[Tensor]:
        losses = engine.accumulate(batch, normalizers)
        norm = engine.finish_step(1).grad_norm
        return [losses.total.view(()), torch.tensor(norm)]

    def plain_step() -> Sequence[Tensor]:
        losses = plain(batch, normalizers)
        losses.total.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), CLIP_NORM)
        adamw.step()
        adamw.zero_grad()
        return [losses.total.detach().view(()), norm]

    for step in (sharded_step, plain_step):
        step()
    return compare(
        f"ZeRO-1 step, one rank {precision}",
        f"{images} x {size} x {size}",
        sharded_step,
        "plain AdamW",
        plain_step,
        tolerance=1e-3,
        repeats=repeats,
        device=device,
        memory=True,
    )
