"""Probe before the first step whether the largest micro-batch fits into GPU memory.

A trial pass contains no collective, so a rank that runs out of memory does not block the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import assert_never

import torch
from torch import nn

from m2f.data_pipeline.config import AugmentConfig, LargeScaleJitter, ScaleJitter, ShortestEdgeCrop
from m2f.data_pipeline.order.order import step_positions
from m2f.data_pipeline.transforms.collate import SIZE_MULTIPLE, Batch
from m2f.model.loss.criterion import Normalizers
from m2f.model.structures import Targets
from m2f.trainer.data import TrainingData
from m2f.trainer.engine.module import TrainingModule
from m2f.trainer.errors import OutOfMemoryError
from m2f.trainer.job import TrainJob
from m2f.trainer.memory.shortage import is_out_of_memory
from m2f.trainer.memory.states import bytes_outside_module, remaining_evaluator_bytes
from m2f.trainer.ranks import Ranks
from m2f.trainer.reporting import Notice, Reporter


def probe_memory(
    module: TrainingModule, job: TrainJob, data: TrainingData, device: torch.device, ranks: Ranks, reporter: Reporter
) -> TrainJob:
    """Return the job with a micro-batch that fits into memory on every rank; unchanged on CPU.

    Runs a forward and a backward pass on images of the largest size, each with the largest number of segments in the
    data. The number of images is halved until they fit. During the passes, memory for ZeRO and for evaluation actors
    is reserved. A collective: every rank must call it.

    Raises:
        OutOfMemoryError: a single image does not fit.
    """
    if device.type != "cuda":
        return job
    training = job.training
    requested = len(step_positions(0, training.global_batch, 0, ranks.world_size, training.micro_batch)[0])
    module.to(device)
    weights = sum(p.numel() for p in module.parameters() if p.requires_grad)
    reserved_bytes = bytes_outside_module(weights, training, ranks.world_size)
    if job.evaluator_bytes:
        free, total = torch.cuda.mem_get_info(device)
        reserved_bytes += remaining_evaluator_bytes(
            job.evaluator_bytes, total - free - torch.cuda.memory_reserved(device)
        )

    def fits(size: int) -> bool:
        return _fits(module, largest_batch(job, size, data.max_segments).to(device), reserved_bytes)

    found = min(ranks.gather(ranks.run_on_all(lambda: largest_that_fits(fits, requested))))
    if found == requested:
        return job
    if ranks.is_first:
        message = (
            f"{requested} images at once (training.micro_batch) do not fit into GPU memory; continuing with {found} "
            "at once, in more micro-batches"
        )
        reporter.report(Notice("memory", 0, message))
    return job.with_micro_batch(found)


def largest_that_fits(fits: Callable[[int], bool], micro_batch: int) -> int:
    """Halve `micro_batch` until it fits, and return it. Raises OutOfMemoryError if even 1 does not fit."""
    size = micro_batch
    while not fits(size):
        if size == 1:
            raise OutOfMemoryError("out of memory before the first step with a single image of the largest size", 1)
        size //= 2
    return size


def largest_batch(job: TrainJob, size: int, targets: int) -> Batch:
    """Return a batch of `size` images of the largest shape, each with `targets` segments.

    `targets` is capped at the number of queries or at `pilots.max_targets`, whichever is larger.
    """
    height, width = largest_shape(job.data.augment)
    assert job.model.num_classes is not None
    targets = max(1, min(targets, max(job.model.transformer_decoder.num_queries, job.model.pilots.max_targets)))
    rows = torch.arange(height * width).view(height, width) % targets + 1
    id_map = rows.to(torch.uint8 if targets < 254 else torch.int16)
    local_id = torch.arange(1, targets + 1).expand(size, -1)
    return Batch(
        images=torch.zeros(size, 3, height, width, dtype=torch.uint8).to(memory_format=torch.channels_last),
        targets=Targets(
            id_maps=id_map.expand(size, 1, -1, -1).contiguous(),
            labels=local_id % job.model.num_classes,
            layer=torch.zeros_like(local_id),
            local_id=local_id.contiguous(),
            valid=torch.ones_like(local_id, dtype=torch.bool),
            weight=torch.ones(size),
            dataset=torch.zeros(size, dtype=torch.int64),
            position=torch.arange(size),
        ),
        keys=("",) * size,
        sizes=torch.tensor([[height, width]] * size),
        dropped_targets=0,
    )


def largest_shape(config: AugmentConfig) -> tuple[int, int]:
    """Return height and width of the largest batch that an augmentation produces."""
    match config:
        case LargeScaleJitter(size=size):
            return size, size
        case ShortestEdgeCrop(crop=crop):
            return crop
        case ScaleJitter(max_size=longest):  # a wide and a tall image in one batch
            side = -(-longest // SIZE_MULTIPLE) * SIZE_MULTIPLE
            return side, side
        case _:
            assert_never(config)


def _fits(module: TrainingModule, batch: Batch, reserved_bytes: int) -> bool:
    """Return whether a forward and a backward pass fit into memory while `reserved_bytes` are held for other uses."""
    device = batch.images.device
    one = torch.ones((), device=device)
    reserved = None
    try:
        with _preserved_buffers(module), torch.random.fork_rng([device] if device.type == "cuda" else []):
            reserved = torch.empty(reserved_bytes, dtype=torch.uint8, device=device)
            module(batch, Normalizers(one, one, one)).total.backward()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        del reserved
        module.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


@contextmanager
def _preserved_buffers(module: nn.Module) -> Iterator[None]:
    """Put BatchNorms into evaluation mode during the block, and restore all buffers afterwards.

    In training mode, BatchNorms would include the artificial images in their running statistics. Synchronised ones
    would also wait for all ranks, and would hang if one of them runs out of memory.
    """
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
