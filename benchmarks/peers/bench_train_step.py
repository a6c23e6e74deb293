"""Benchmark of a whole training step of the R50 model: forward, matching, loss, backward, clipping, AdamW.

The peers have the same weights, images and targets:

- `transformers` unmodified and, on a GPU, in its fastest form (channels-last weights, compiled parts). It draws its own
  random points, so its losses may differ from ours, but class and mask logits must agree.
- The published code's order of operations.
- Our own step without matching, which shows the cost of matching.

The floor is the time of the matrix products and convolutions of our step, which any implementation needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import Measurement, compare, without_tf32
from benchmarks.peers.official_order import official_loss, official_pixel_decoder
from benchmarks.peers.transformers_peer import CONFIG, compile_parts, twins
from benchmarks.synthetic_batches import LAYERS, OBJECTS, dense_masks, make_batch
from m2f.data_pipeline.transforms.collate import Batch
from m2f.model.cpu_products import fast_cpu_products
from m2f.model.loss import criterion
from m2f.model.loss.criterion import Normalizers, count_normalizers, point_counts
from m2f.model.loss.matcher import Matching
from m2f.model.loss.points import CounterPoints
from m2f.model.mask2former import Mask2Former
from m2f.trainer.config import OptimizerConfig
from m2f.trainer.engine.compile import compile_regions
from m2f.trainer.engine.module import TrainingModule
from m2f.trainer.engine.param_groups import build_param_groups

LOSS_TOLERANCE = 0.03
"""Largest relative difference of the losses. Losses at different random points differ by about one per cent."""
SAME_POINTS_TOLERANCE = {"fp32": 1e-4, "bf16": 0.02}
"""Largest relative difference of losses at the same points, by precision."""

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "linear", "_scaled_dot_product")
"""Name prefixes of the operations that count towards the floor, including convolution_backward."""

Step = Callable[[], Sequence[Tensor]]


def run(tiny: bool, device: torch.device) -> list[Measurement]:
    """Measure batch 2 at 512 pixels in fp32 on a CPU (`tiny`: 256).

    On a GPU, measure several batches at 1024 pixels under bf16 autocast (`tiny`: batch 2).
    """
    if device.type == "cpu":
        case = _Case(2, 256 if tiny else 512, device, repeats=2 if tiny else 5)
        return [
            case.against_transformers(),
            case.without_matching(),
            *([] if tiny else [case.against_official_order()]),
        ]
    cases = [_Case(images, 1024, device, repeats=20) for images in ((2,) if tiny else (1, 2, 4, 8))]
    results = [case.against_transformers() for case in cases]
    return [
        *results,
        cases[-1].without_matching(),
        cases[-1].against_official_order(),
        cases[-1].against_compiled_transformers(),
    ]


@dataclass(frozen=True)
class _Case:
    """One comparison: size of the batch, device, and number of timed runs."""

    images: int
    size: int
    device: torch.device
    repeats: int

    @property
    def precision(self) -> str:
        return "fp32" if self.device.type == "cpu" else "bf16"

    def against_transformers(self) -> Measurement:
        """Compare with `transformers`; neither side is compiled."""
        workload = _workload(self)
        result = self._measure(
            "R50 training step", "transformers", workload.our_step(), workload.transformers_step(), LOSS_TOLERANCE
        )
        return replace(result, floor_ms=_product_milliseconds(workload.our_step(), self.device))

    def against_compiled_transformers(self) -> Measurement:
        """Compare with `transformers`; both are compiled and channels-last.

        Our model needs no conversion, because `normalise` returns channels-last images on a GPU.
        """
        workload = _workload(self)
        compile_regions(workload.ours)
        compile_parts(workload.theirs.to(memory_format=torch.channels_last))
        steps = workload.our_step(), workload.transformers_step(torch.channels_last)
        return self._measure("R50 training step, compiled", "transformers, compiled", *steps, LOSS_TOLERANCE)

    def against_official_order(self) -> Measurement:
        """Compare with the official order of operations at the same points, so the losses must agree."""
        workload = _workload(self)
        tolerance = SAME_POINTS_TOLERANCE[self.precision]
        return self._measure(
            "R50 training step", "official order", workload.our_step(), workload.official_step(), tolerance
        )

    def without_matching(self) -> Measurement:
        """Compare with our own step without matching; a ratio of 0.97 means that matching takes 3 % of the step."""
        workload = _workload(self)
        step = workload.our_step()

        def step_without_matching() -> Sequence[Tensor]:
            with _known_matching(matching):
                return step()

        with _recorded_matching() as matchings:
            step()
        matching = matchings[-1]
        return self._measure(
            "R50 training step",
            "itself, matches known",
            step,
            step_without_matching,
            SAME_POINTS_TOLERANCE[self.precision],
        )

    def _measure(self, case: str, peer_name: str, ours: Step, peer: Step, tolerance: float) -> Measurement:
        ours(), peer()  # allocates the optimizer state, which is not part of a step's memory
        shape = f"{self.images} x {self.size} x {self.size}, {OBJECTS} masks"
        name = f"{case} {self.precision}"
        return compare(name, shape, ours, peer_name, peer, tolerance, self.repeats, self.device, memory=True)


class _Workload(NamedTuple):
    """Both models with the same weights, a batch, and its normalizers."""

    case: _Case
    ours: Mask2Former
    theirs: nn.Module
    batch: Batch
    normalizers: Normalizers

    def our_step(self) -> Step:
        precision = "fp32" if self.case.precision == "fp32" else "bf16_autocast"
        module = TrainingModule(self.ours, CONFIG, seed=0, precision=precision)
        step = _step(self.ours, lambda: module(self.batch, self.normalizers).total)
        return fast_cpu_products(self.case.device)(step)  # as in a rank

    def transformers_step(self, memory_format: torch.memory_format = torch.contiguous_format) -> Step:
        pixels = self.ours.normalise(self.batch.images).contiguous(memory_format=memory_format)
        masks, labels = dense_masks(self.batch.targets), list(self.batch.targets.labels)

        def loss() -> Tensor:
            with self.autocast():
                return self.theirs(pixel_values=pixels, mask_labels=masks, class_labels=labels).loss.view(())

        return _step(self.theirs, loss)

    def official_step(self) -> Step:
        """Return a step of our network with the published code's pixel decoder, dense masks and losses."""
        model, targets, source = official_pixel_decoder(self.ours), self.batch.targets, CounterPoints(seed=0)
        pixels, truth, labels = model.normalise(self.batch.images), dense_masks(targets), list(targets.labels)

        def loss() -> Tensor:
            with self.autocast():
                predictions = model(pixels)
            masks = [predictions.mask_logits(layer) for layer in range(LAYERS)]
            predictions = predictions._replace(class_logits=predictions.class_logits.float())
            drawn = source.draw(targets.position, LAYERS, point_counts(CONFIG.loss))
            return official_loss(predictions, masks, labels, truth, drawn, CONFIG.loss)

        return _step(model, loss)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.case.device.type, torch.bfloat16, enabled=self.case.precision != "fp32")


def _workload(case: _Case) -> _Workload:
    """Build both models and check that their fp32 logits agree."""
    ours, theirs = (model.to(case.device) for model in twins())
    batch = make_batch(case.images, case.size, OBJECTS).to(case.device)
    with torch.no_grad(), without_tf32():
        pixels = ours.normalise(batch.images)
        our_output, their_output = ours(pixels), theirs(pixel_values=pixels)
    torch.testing.assert_close(our_output.class_logits[-1], their_output.class_queries_logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(our_output.mask_logits(), their_output.masks_queries_logits, rtol=1e-3, atol=1e-3)
    normalizers = count_normalizers(batch.targets, CONFIG.transformer_decoder.num_queries, CONFIG.loss)
    return _Workload(case, ours, theirs, batch, normalizers)


def _step(model: nn.Module, compute_loss: Callable[[], Tensor]) -> Step:
    """Return a function that runs one training step, with a learning rate so small that all losses are equal."""
    optimizer = torch.optim.AdamW(build_param_groups(model, OptimizerConfig(lr=1e-12)), fused=True)

    def step() -> Sequence[Tensor]:
        loss = compute_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        return [loss.detach().view(())]

    return step


class _FinishedMatching(NamedTuple):
    """Stand-in for a pending matching; its result is already known."""

    matching: Matching

    def result(self) -> Matching:
        return self.matching


@contextmanager
def _known_matching(matching: Matching) -> Iterator[None]:
    with patch.object(criterion, "start_matching", lambda *_: _FinishedMatching(matching)):
        yield


@contextmanager
def _recorded_matching() -> Iterator[list[Matching]]:
    matchings: list[Matching] = []
    start = criterion.start_matching

    def recorded(*arguments: Any) -> _FinishedMatching:
        matchings.append(start(*arguments).result())
        return _FinishedMatching(matchings[-1])

    with patch.object(criterion, "start_matching", recorded):
        yield matchings


class _ProductTimer(TorchDispatchMode):
    """Sums the CPU time of matrix products and convolutions."""

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


def _product_milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds that a step spends in matrix products and convolutions."""
    if device.type == "cpu":
        with _ProductTimer() as timer:
            step()
        return timer.milliseconds
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.key_averages()
    # Self time only, because `linear` would count the kernels of the `addmm` inside it again.
    return sum(e.self_device_time_total for e in events if e.key.removeprefix("aten::").startswith(_PRODUCTS)) / 1000
