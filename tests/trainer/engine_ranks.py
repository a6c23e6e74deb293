"""Scenarios of test_engine.py: three steps of four images, once per DeepSpeed configuration and once in plain torch.

Not a test module; `rank_main.py` runs it on every rank.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import cache
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m2f.data_pipeline.order.order import step_positions
from m2f.data_pipeline.transforms.collate import Batch
from m2f.model.deform_attn.module import Float32Linear
from m2f.model.loss.criterion import Normalizers, count_normalizers
from m2f.model.mask2former import build_model
from m2f.model.structures import Targets
from m2f.trainer.config import TrainingConfig, ZeroConfig
from m2f.trainer.engine.engine import Engine, deepspeed_config
from m2f.trainer.engine.module import TrainingModule
from m2f.trainer.engine.param_groups import build_param_groups
from m2f.trainer.engine.queued_step import loss_terms
from m2f.trainer.ranks import Ranks
from m2f.trainer.telemetry.metrics import sum_over_ranks
from tests.waiting import PATIENCE_S

STEPS, GLOBAL_BATCH, EMA_DECAY = 3, 4, 0.2  # the first step has a decay of 2 / 11
BASE = {"global_batch": GLOBAL_BATCH, "micro_batch": 2, "ema_decay": EMA_DECAY}
_SMALL = {"reduce_bucket_size": 1000, "param_persistence_threshold": 0}
CASES = {
    "stage0": {"zero": ZeroConfig(stage=0)},
    "stage1": {"zero": ZeroConfig(stage=1)},
    "stage2": {"zero": ZeroConfig(stage=2)},
    "stage3": {"zero": ZeroConfig(stage=3, param_persistence_threshold=0)},
    "stage1_small_buckets": {"zero": ZeroConfig(stage=1, overlap_comm=False, **_SMALL)},
    "stage2_small_buckets": {"zero": ZeroConfig(stage=2, overlap_comm=False, **_SMALL)},
    "stage3_small_buckets": {"zero": ZeroConfig(stage=3, overlap_comm=False, **_SMALL)},
    "stage1_accumulated": {"zero": ZeroConfig(stage=1), "micro_batch": 1},
    "stage2_accumulated": {"zero": ZeroConfig(stage=2), "micro_batch": 1},
    "stage3_accumulated": {"zero": ZeroConfig(stage=3, param_persistence_threshold=0), "micro_batch": 1},
    "stage0_accumulated": {"zero": ZeroConfig(stage=0), "micro_batch": 1},
    **{f"stage{stage}_offload": {"zero": ZeroConfig(stage=stage, offload_optimizer=True)} for stage in (1, 2, 3)},
    **{f"stage{stage}_pure_bf16": {"precision": "bf16", "zero": ZeroConfig(stage=stage)} for stage in (1, 2, 3)},
    "stage1_bf16": {"precision": "bf16_autocast"},
    "stage3_bf16": {"precision": "bf16_autocast", "zero": ZeroConfig(stage=3, **_SMALL)},
    "stage1_bf16_fp32_pixels": {"precision": "bf16_autocast", "pixel_decoder_fp32": True},
    **{f"stage{stage}_fp16": {"precision": "fp16_autocast", "zero": ZeroConfig(stage=stage)} for stage in range(4)},
    "stage1_fp16_accumulated": {"precision": "fp16_autocast", "micro_batch": 1},
}
"""Training settings on two ranks, in addition to `BASE`."""
SINGLE_RANK_CASES = {
    "whole": {},
    "accumulated": {"micro_batch": 1},
    "pure_bf16": {"precision": "bf16"},
    "pure_bf16_accumulated": {"precision": "bf16", "micro_batch": 1},
    "offload": {"zero": ZeroConfig(offload_optimizer=True)},
}
"""Training settings on one rank, in addition to `BASE` and a micro-batch of all images."""
HOST_SYNC_CASES = {
    "stage0": {"zero": ZeroConfig(stage=0)},
    "stage1": {},
    "stage2": {"zero": ZeroConfig(stage=2)},
    "bf16": {"precision": "bf16"},
    "offload": {"zero": ZeroConfig(offload_optimizer=True)},
}
"""Likewise, for counting synchronisations with the device."""


def make_images(model_config, positions) -> Batch:
    """Return images for `positions`. Odd positions, all on rank 1 of 2, have no objects; None gives a filler."""
    made = [_image(position) for position in positions]
    stack = {name: torch.stack([image[name] for image in made]) for name in made[0]}
    return Batch(
        images=stack["pixels"],
        targets=Targets(
            id_maps=stack["id_map"][:, None],
            labels=stack["labels"] % model_config.num_classes,
            layer=torch.zeros(len(made), 3, dtype=torch.int64),
            local_id=torch.arange(1, 4).repeat(len(made), 1),
            valid=stack["valid"],
            weight=stack["weight"],
            dataset=torch.zeros(len(made), dtype=torch.int64),
            position=stack["position"],
        ),
        keys=tuple(str(position) for position in positions),
        sizes=torch.full((len(made), 2), 64),
        dropped_targets=0,
    )


def _image(position) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(position or 0)
    id_map = torch.zeros(64, 64, dtype=torch.uint8)
    with_objects = position is not None and position % 2 == 0
    if with_objects:
        for local_id, corner in enumerate(torch.randint(0, 40, (3, 2), generator=generator).tolist(), start=1):
            id_map[corner[0] : corner[0] + 24, corner[1] : corner[1] + 24] = local_id
    return {
        "pixels": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator),
        "id_map": id_map,
        "labels": torch.randint(0, 10, (3,), generator=generator),
        "valid": torch.full((3,), with_objects),
        "weight": torch.tensor(0.0 if position is None else 1.0),
        "position": torch.tensor(-1 if position is None else position),
    }


def fresh_module(job, precision="fp32", pixel_decoder_fp32=False) -> TrainingModule:
    torch.manual_seed(0)
    model = build_model(job.model, pretrained_backbone=False)
    return TrainingModule(model, job.model, job.seed, precision, pixel_decoder_fp32=pixel_decoder_fp32)


def normalizers_of(job, batches, ranks=None) -> Normalizers:
    queries = job.model.transformer_decoder.num_queries
    counts = [torch.stack(count_normalizers(batch.targets, queries, job.model.loss)).double() for batch in batches]
    total = torch.stack(counts).sum(0)
    return Normalizers(*(total if ranks is None else ranks.sum(total)).float().unbind())


def plain_torch(job) -> dict:
    """Train on one rank with one batch per step and without DeepSpeed: the reference for every configuration."""
    config = job.training.optimizer
    module = fresh_module(job)
    start = {name: value.clone() for name, value in module.model.state_dict().items()}
    optimizer = torch.optim.AdamW(build_param_groups(module, config), betas=config.betas, eps=config.eps)
    average = dict(start)
    seen = {"losses": [], "norms": [], "gradients": None}
    for step in range(STEPS):
        batch = make_images(job.model, range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))
        losses = module(batch, normalizers_of(job, [batch]))
        losses.total.backward()
        if step == 0:
            seen["gradients"] = {name: p.grad.clone() for name, p in module.model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(EMA_DECAY, (2 + step) / (11 + step))
        average = {name: decay * average[name] + (1 - decay) * p for name, p in module.model.state_dict().items()}
        seen["losses"].append(float(losses.total))
        seen["norms"].append(float(norm))
    weights = module.model.state_dict()
    return {**seen, "weights": weights, "average": average, "change": distance(weights, start)}


def distance(weights: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Return the L2 norm of the difference between two sets of weights."""
    return sum(float((weights[name] - other).square().sum()) for name, other in others.items()) ** 0.5


def with_engine(job, training: TrainingConfig, reference: dict, ranks: Ranks) -> dict:
    """Run the same steps through DeepSpeed; return the results and their differences from plain torch."""
    module = fresh_module(job, training.precision, training.pixel_decoder_fp32)
    if module.loss_scale is not None:
        module.loss_scale.scale = 16.0  # the default initial scale overflows in the first steps
    engine = Engine(module, training, torch.device("cpu"))
    seen = {"losses": [], "norms": [], "applied": [], "dtypes": dtypes(engine)}
    for step in range(STEPS):
        plan = step_positions(step, GLOBAL_BATCH, ranks.rank, ranks.world_size, training.micro_batch)
        batches = [make_images(job.model, positions) for positions in plan]
        normalizers = normalizers_of(job, batches, ranks)
        losses = [engine.accumulate(batch, normalizers) for batch in batches]
        if step == 0 and training.zero.stage == 0:
            seen["gradient_error"] = max(
                float((p.grad - reference["gradients"][name]).abs().max() / (reference["norms"][0]))
                for name, p in engine.module.model.named_parameters()
            )
        result = engine.finish_step(step + 1)
        seen["losses"].append(sum_over_ranks(loss_terms(losses), ranks).total)
        seen["norms"].append(result.grad_norm)
        seen["applied"].append(result.applied)
    weights = engine.weights()
    averaged = engine.averaged_weights(weights)
    if ranks.is_first:
        assert set(weights) == set(reference["weights"])
        # Not elementwise: where a gradient is only rounding error, Adam takes a full step in an arbitrary direction.
        seen["weight_error"] = distance(weights, reference["weights"]) / reference["change"]
        seen["average_error"] = distance(averaged, reference["average"]) / reference["change"]
    return seen


def dtypes(engine: Engine) -> dict[str, list[str]]:
    """Return the dtypes of weights and buffers. Those of coordinates are appended during later forward passes."""
    model = engine.module.model
    seen = {"weights": sorted({str(p.dtype) for p in model.parameters()}), "coordinates": []}
    seen["buffers"] = sorted({str(b.dtype) for b in model.buffers() if b.is_floating_point()})
    for module in model.modules():
        if isinstance(module, Float32Linear):
            module.register_forward_hook(lambda _, __, output: seen["coordinates"].append(str(output.dtype)))
    return seen


@cache
def reference_of(make_job: Callable) -> dict:
    """Return the results of plain torch, computed once per process."""
    return plain_torch(make_job(global_batch=GLOBAL_BATCH))


def plain(make_job) -> dict:
    """Return the losses and gradient norms of plain torch."""
    reference = reference_of(make_job)
    assert all(math.isfinite(loss) for loss in reference["losses"])
    return {name: reference[name] for name in ("losses", "norms")}


def agreement(make_job, case: str) -> dict:
    """Run one of `CASES`. `make_job(**training)` returns a job with these training settings."""
    job = make_job(**(BASE | CASES[case]))
    seen = with_engine(job, job.training, reference_of(make_job), Ranks(PATIENCE_S))
    dist.barrier()
    return seen


def one_rank(make_job, case: str) -> dict:
    """Run one of `SINGLE_RANK_CASES` with the ZeRO settings of a single rank and with those of several ranks."""
    job = make_job(**(BASE | {"micro_batch": 4} | SINGLE_RANK_CASES[case]))
    ranks, reference = Ranks(PATIENCE_S), reference_of(make_job)
    alone = with_engine(job, job.training, reference, ranks)
    with patch("m2f.trainer.engine.engine.deepspeed_config", _multi_rank_config):
        among = with_engine(job, job.training, reference, ranks)
    return {"alone": alone, "among": among}


def _multi_rank_config(training: TrainingConfig, world_size: int, universal: bool = False) -> dict:
    settings = deepspeed_config(training, world_size, universal)
    return settings | {"zero_optimization": deepspeed_config(training, world_size + 1)["zero_optimization"]}


class HostSyncCounter(TorchDispatchMode):
    """Counts operations that would make the host wait for a device: reads of tensor values, and host constants.

    Also counts all operations, each of which costs the host some microseconds.
    """

    SYNC_OPERATIONS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        if func in self.SYNC_OPERATIONS:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def host_syncs(make_job, case: str) -> dict:
    """Count host synchronisations and operations in four steps of one of `HOST_SYNC_CASES`."""
    job = make_job(**(BASE | {"micro_batch": 4, "ema_decay": 0.0} | HOST_SYNC_CASES[case]))
    engine = Engine(fresh_module(job, job.training.settled_precision), job.training, torch.device("cpu"))
    seen = {"backward": [], "update": [], "calls": [], "parameters": len(list(engine.module.parameters()))}
    gc.collect()  # DeepSpeed's optimizers of earlier cases synchronise when they are freed
    with patch("deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.synchronize") as synchronize:
        for _ in range(4):
            batch = make_images(job.model, range(GLOBAL_BATCH))
            losses = engine._engine(batch, normalizers_of(job, [batch]))
            with HostSyncCounter() as backward:
                engine._engine.backward(losses.total)
            with HostSyncCounter() as update:
                norm = engine.update()
            assert engine.finish_update(1, float(norm)).applied
            seen["backward"].append(len(backward.seen))
            seen["update"].append(len(update.seen))
            seen["calls"].append(update.calls)
    return seen | {"synchronized": synchronize.call_count}


def poisoned(make_job) -> list:
    """Return for each of three steps whether it was applied and how far it moved the weights.

    The second step has a NaN gradient.
    """
    job = make_job(**(BASE | {"micro_batch": 4}))
    engine = Engine(fresh_module(job), job.training, torch.device("cpu"))
    seen = []
    for step in range(3):
        batch = make_images(job.model, range(GLOBAL_BATCH))
        before = {name: value.clone() for name, value in engine.weights().items()}
        hook = next(engine.module.parameters()).register_hook(lambda g, bad=step == 1: g * math.nan if bad else g)
        engine.accumulate(batch, normalizers_of(job, [batch]))
        result = engine.finish_step(step + 1)
        hook.remove()
        seen.append((result.applied, distance(engine.weights(), before)))
    return seen
