"""A whole training step of the R50 model: forward, matching, loss, backward, clipping, AdamW. Against `transformers`.

Both have the same weights, images and targets; each draws its own random points. Their class and mask logits must
agree, and their losses must, up to what other points change. The floor is the time of the matrix products and
convolutions of our step, which any implementation needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import Row, compare
from benchmarks.memory import peak_growth
from benchmarks.scenes import dense_masks, make_batch
from benchmarks.transformers_peer import CONFIG, twins
from model.criterion import count_normalizers
from trainer.config import OptimizerConfig
from trainer.module import TrainingModule
from trainer.param_groups import build_param_groups

OBJECTS = 10
LOSS_TOLERANCE = 0.03
"""Losses at different random points differ by about one per cent."""

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product")
"""Beginnings of the names of operations that count as floor; convolution_backward is one of them."""

_PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "convolution",
    "aten::linear",
    "aten::_scaled_dot",
)


def run(tiny: bool, device: torch.device) -> list[Row]:
    """Batch 2 at 512 pixels on a CPU in fp32; on a GPU several batches at 1024 pixels under bf16 autocast."""
    if device.type == "cpu":
        return [_case(2, 256 if tiny else 512, device, repeats=3)]
    return [_case(images, 1024, device, repeats=20) for images in ((2,) if tiny else (1, 2, 4, 8))]


def _case(images: int, size: int, device: torch.device, repeats: int) -> Row:
    ours, theirs = (model.to(device) for model in twins())
    precision = "fp32" if device.type == "cpu" else "bf16_autocast"
    module = TrainingModule(ours, CONFIG, seed=0, precision=precision)
    batch = make_batch(images, size, OBJECTS).to(device)
    normalizers = count_normalizers(batch.targets, CONFIG.transformer_decoder.num_queries, CONFIG.loss)
    pixels = ours.normalise(batch.images)
    masks, labels = dense_masks(batch.targets), list(batch.targets.labels)

    def our_loss() -> Tensor:
        return module(batch, normalizers).total

    def their_loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32"):
            loss = theirs(pixel_values=pixels, mask_labels=masks, class_labels=labels).loss
        assert loss is not None
        return loss

    our_step, their_step = (_step(m, loss) for m, loss in ((ours, our_loss), (theirs, their_loss)))
    _check_agreement(ours, theirs, pixels, our_loss, their_loss)
    for step in (our_step, their_step):  # optimizer states are allocated once and not part of a step's memory
        step()
    ours_gb, peer_gb = (peak_growth(step, device) for step in (our_step, their_step))
    floor_ms = _time_of_products(our_step, device)
    row = compare(
        f"R50 training step {precision}",
        f"{images} x {size} x {size}, {OBJECTS} masks",
        our_step,
        "transformers",
        their_step,
        tolerance=LOSS_TOLERANCE,
        repeats=repeats,
        device=device,
    )
    return replace(row, ours_gb=ours_gb, peer_gb=peer_gb, floor_ms=floor_ms)


def _check_agreement(
    ours: nn.Module, theirs: nn.Module, pixels: Tensor, our_loss: Callable[[], Tensor], their_loss: Callable[[], Tensor]
) -> None:
    """In fp32, whatever the precision of the measured steps."""
    with torch.no_grad():
        mine, other = ours(pixels), theirs(pixel_values=pixels)
        torch.testing.assert_close(mine.class_logits[-1], other.class_queries_logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mine.mask_logits(), other.masks_queries_logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(our_loss(), their_loss().view(()), rtol=LOSS_TOLERANCE, atol=0)


def _step(model: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], Sequence[Tensor]]:
    """One optimizer step with so small a rate that all repetitions see the same losses."""
    optimizer = torch.optim.AdamW(build_param_groups(model, OptimizerConfig(lr=1e-12)), fused=True)

    def step() -> Sequence[Tensor]:
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        return [loss.detach().view(())]

    return step


class _TimedProducts(TorchDispatchMode):
    """Adds up the CPU time of matrix products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.milliseconds = 0.0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        start = time.process_time()
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.startswith(_PRODUCTS):
            self.milliseconds += 1000 * (time.process_time() - start)
        return result


def _time_of_products(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of matrix products and convolutions inside a step."""
    if device.type == "cpu":
        with _TimedProducts() as timed:
            step()
        return timed.milliseconds
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.key_averages()
    return sum(e.device_time_total for e in events if e.key.removeprefix("aten::").startswith(_PRODUCTS)) / 1000
