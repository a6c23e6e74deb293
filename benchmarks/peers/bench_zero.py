"""Benchmark of DeepSpeed: a ZeRO-1 step of one rank against plain AdamW, and of two ranks against DDP."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import CPU, Measurement, Times, compare
from benchmarks.peers.transformers_peer import CONFIG
from benchmarks.synthetic_batches import make_batch
from m2f.cluster.train.launch import launch
from m2f.model.loss.criterion import count_normalizers
from m2f.model.mask2former import build_model
from m2f.trainer.config import OptimizerConfig, TrainingConfig, ZeroConfig
from m2f.trainer.engine.engine import Engine
from m2f.trainer.engine.module import TrainingModule
from m2f.trainer.engine.param_groups import build_param_groups
from m2f.trainer.worker import process_group

CLIP_NORM = 0.01
"""Limit of the gradient norm, as in the paper's training."""
IMAGES = 2  # per rank


def run(tiny: bool, device: torch.device) -> list[Measurement]:
    """Measure the R50 model with a batch of 2 per rank; two ranks only on a CPU and without `tiny`."""
    for variable, text in (("DS_ACCELERATOR", device.type), ("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(variable, text)
    store = dist.HashStore()
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl", store=store, rank=0, world_size=1)
    try:
        size = 1024 if device.type != "cpu" else 128 if tiny else 512
        result = _case(size, device, repeats=3 if device.type == "cpu" else 20)
    finally:
        dist.destroy_process_group()
    return [result] if tiny or device.type != "cpu" else [result, _two_ranks(256)]


def _two_ranks(size: int) -> Measurement:
    """Measure the CPU time of rank 0 of two ranks on this machine."""
    with TemporaryDirectory() as folder:
        result_path = Path(folder) / "result.json"
        launch(_rank, (size, str(result_path)), 2, {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
        result = json.loads(result_path.read_text())
    return Measurement(**result | {"ours": Times(*result["ours"]), "theirs": Times(*result["theirs"])})


def _rank(size: int, result_path: str) -> None:
    torch.set_num_threads(1)
    with process_group(CPU, 120.0):
        result = _case(size, CPU, repeats=3)
        if dist.get_rank() == 0:
            Path(result_path).write_text(json.dumps(vars(result)))


def _case(size: int, device: torch.device, repeats: int) -> Measurement:
    world = dist.get_world_size()
    precision = "fp32" if device.type == "cpu" else "bf16_autocast"
    torch.manual_seed(0)
    plain = TrainingModule(build_model(CONFIG, pretrained_backbone=False), CONFIG, 0, precision).to(device)
    # The learning rate is so small that the weights are practically constant.
    optimizer = OptimizerConfig(lr=1e-12, clip_norm=CLIP_NORM)
    training = TrainingConfig(
        max_steps=1,
        global_batch=world * IMAGES,
        micro_batch=IMAGES,
        precision=precision,
        optimizer=optimizer,
        zero=ZeroConfig(stage=1),
    )
    engine = Engine(deepcopy(plain), training, device)
    adamw = torch.optim.AdamW(build_param_groups(plain.model, optimizer), fused=True)
    peer = DistributedDataParallel(plain) if world > 1 else plain
    batch = make_batch(IMAGES, size, objects=10, seed=dist.get_rank()).to(device)
    normalizers = count_normalizers(batch.targets, CONFIG.transformer_decoder.num_queries, CONFIG.loss)
    normalizers = type(normalizers)(*(world * value.cpu() for value in normalizers))

    def sharded_step() -> Sequence[Tensor]:
        losses = engine.accumulate(batch, normalizers)
        norm = engine.finish_step(1).grad_norm
        return [losses.total.view(()), torch.tensor(norm)]

    def plain_step() -> Sequence[Tensor]:
        losses = peer(batch, normalizers)
        (world * losses.total).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), CLIP_NORM)
        adamw.step()
        adamw.zero_grad()
        return [losses.total.detach().view(()), norm]

    for step in (sharded_step, plain_step):
        step()
    return compare(
        f"ZeRO-1 step, {world} rank{'s' if world > 1 else ''} {precision}",
        f"{IMAGES} x {size} x {size}",
        sharded_step,
        "DistributedDataParallel" if world > 1 else "plain AdamW",
        plain_step,
        tolerance=1e-3,
        repeats=repeats,
        device=device,
        memory=True,
    )
