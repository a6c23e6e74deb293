"""GPU memory of a forward and a backward pass, computed from tensors that have shapes but no values."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m2f.model.analysis.flops.executed import SHAPES_ONLY, build_shapes
from m2f.model.config import ModelConfig
from m2f.model.deform_attn.module import MSDeformAttn, SamplingGrid
from m2f.model.loss.criterion import point_counts
from m2f.model.loss.mask_losses import row_losses
from m2f.model.loss.point_sampling import chunk_elements, sample_maps
from m2f.model.pilots import PilotQueries, Pilots
from m2f.model.segmenter import TrainingContext
from m2f.model.structures import Predictions, Targets


class Activations(NamedTuple):
    """Bytes used by one micro-batch, without weights, their gradients and the optimizer state."""

    kept: int
    """Bytes that the backward pass needs, measured after the loss is computed."""
    peak: int
    """Maximum bytes during both passes."""


def count_activations(
    config: ModelConfig,
    images: int,
    size: tuple[int, int],
    targets: int,
    autocast: bool,
    weights: torch.dtype,
    *,
    pixel_decoder_fp32: bool = False,
) -> Activations:
    """Count the memory of forward pass, loss and backward pass.

    The count covers tensors. Library workspaces and unused memory of the allocator are not included.

    Args:
        config: settings of the model.
        images: number of images in the micro-batch.
        size: height and width of the images.
        targets: segments per image.
        autocast: whether autocast to 16 bits is active.
        weights: data type of the weights.
        pixel_decoder_fp32: whether the pixel decoder runs without autocast.
    """
    model = build_shapes(config, weights).train()
    model.pixel_decoder_fp32 = pixel_decoder_fp32
    _use_kernel_shapes(model)
    with SHAPES_ONLY:
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        truth = _targets(images, size, targets)
        queries = PilotQueries(config, seed=0) if config.pilots.max_targets else None
        with LiveBytesCounter() as live:
            pixels = model.normalise(torch.empty(images, 3, *size, dtype=torch.uint8))
            pilots = None if queries is None else queries(truth)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                predictions = model(pixels, TrainingContext(truth, 0, pilots))
            loss = _loss(predictions, config, targets, pilots)
            kept = live.current
            loss.backward()
    return Activations(kept, live.peak)


class LiveBytesCounter(TorchDispatchMode):
    """Counts the bytes of all live storages created by operations inside the context: `current` and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        old = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in old | self._known:
                self._track(tensor.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


def _drop_gradient(parameter: Tensor) -> None:
    """Drop the gradient of a weight. Gradients are counted separately, because ZeRO may release them immediately."""
    parameter.grad = None


def _use_kernel_shapes(model: nn.Module) -> None:
    """Give deformable attention the memory use of the fused GPU kernel instead of the CPU implementation."""
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.attend = _attend_as_kernel  # type: ignore[method-assign]


def _attend_as_kernel(value: Tensor, offsets: Tensor, logits: Tensor, grid: SamplingGrid) -> Tensor:
    return _KernelShapes.apply(value, offsets, logits)


class _KernelShapes(torch.autograd.Function):
    """Saves and allocates the same tensors as `m2f.model.deform_attn.triton_op`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(value, offsets, logits)
        batch, _, heads, dim = value.shape
        return value.new_empty(batch, offsets.shape[1], heads * dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, offsets, logits = ctx.saved_tensors
        sums = torch.empty_like(value, dtype=torch.float32)
        return sums.to(value.dtype), torch.empty_like(offsets), torch.empty_like(logits)


def _targets(images: int, size: tuple[int, int], targets: int) -> Targets:
    """Return targets of the right shapes for `images` with `targets` segments each."""
    of_images, of_targets = torch.zeros(images, dtype=torch.int64), torch.zeros(images, targets, dtype=torch.int64)
    return Targets(
        id_maps=torch.zeros(images, 1, *size, dtype=torch.uint8 if targets < 255 else torch.int16),
        labels=of_targets,
        layer=of_targets,
        local_id=of_targets,
        valid=of_targets == 0,
        weight=torch.ones(images),
        dataset=of_images,
        position=of_images,
    )


def _loss(predictions: Predictions, model: ModelConfig, targets: int, pilots: Pilots | None) -> Tensor:
    """Return a loss with the memory use of the criterion, with every prediction matched to `targets` segments.

    No matching is solved.
    """
    config, num_pilots = model.loss, 0 if pilots is None else pilots.target.shape[1]
    layers, images, queries, _ = predictions.class_logits[:, :, num_pilots:].shape
    known, targets = min(targets, model.pilots.max_targets), min(targets, queries)
    classes = predictions.class_logits.float().flatten(0, 2)
    class_loss = F.cross_entropy(classes, torch.zeros(len(classes), dtype=torch.int64), reduction="none").sum()

    maps = [features.float() for features in predictions.feature_maps]
    embeddings = predictions.mask_embeddings[:, :, num_pilots : num_pilots + targets].float().transpose(0, 1)
    rows = embeddings.reshape(images * len(maps), -1, embeddings.shape[-1])
    if pilots is not None:
        of_pilots = predictions.mask_embeddings[pilots.first_prediction :, :, :known].float()
        rows = torch.cat((rows, of_pilots.transpose(0, 1).flatten(1, 2)), dim=1)
    features = [of_map[image] for image in range(images) for of_map in maps]
    logits = torch.cat([embedding @ pixels.flatten(1) for embedding, pixels in zip(rows, features, strict=True)])
    counts = point_counts(config)
    matching = layers * images * (maps[0].shape[1] + 2 * queries + targets) * counts.matching
    largest = max(matching, 8 * len(logits) * counts.candidates)
    scratch = torch.empty(min(largest, chunk_elements(torch.device("cuda"))))
    del scratch
    points = torch.empty(len(logits), config.num_points, 2)
    samples = sample_maps(logits.unflatten(1, maps[0].shape[2:]), points)
    weights = torch.empty_like(samples) if config.supervision_box_share else None
    mask, dice = row_losses(samples, torch.empty_like(samples), config.mask_loss, weights)
    return class_loss + mask.sum() + dice.sum()
