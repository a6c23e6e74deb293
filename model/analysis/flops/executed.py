"""Multiply-adds that our model executes on a CPU, counted in a run on tensors without values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torchvision  # noqa: F401 - defines torch.ops.torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from m2f.model.analysis.flops.operations import BATCH_NORM, BILINEAR, NEAREST, NORM, Flops
from m2f.model.backbones.build import Backbone, build_backbone
from m2f.model.config import BackboneConfig, ModelConfig
from m2f.model.mask2former import build_model
from m2f.model.segmenter import Segmenter

Size = Sequence[int]
"""Shape of a tensor, as passed by the counter."""

Module = TypeVar("Module", bound=nn.Module)

_AFTER_TRAINING = 10**9
"""A step after the end of any training run."""
SHAPES_ONLY = FakeTensorMode()
"""Mode in which tensors have no values. All models share it, because tensors of two modes cannot be combined."""


def build_shapes(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Segmenter:
    """Return the recipe's model in evaluation mode, with weights of `dtype` that have shapes but no values."""
    with torch.device("meta"):
        model = build_model(config, pretrained_backbone=False)
    return _on_fake_cpu(model.to(dtype)).eval()


def build_backbone_shapes(config: BackboneConfig) -> Backbone:
    """Return the recipe's backbone in evaluation mode, with shapes but without values."""
    with torch.device("meta"):
        backbone = build_backbone(config, pretrained=False)
    return _on_fake_cpu(backbone).eval()


def _on_fake_cpu(module: Module) -> Module:
    """Move a module from the meta device to a fake CPU.

    Some initialisations work on the meta device only, but autocast does not work there.
    """
    with SHAPES_ONLY:
        return module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameter values, including those of frozen parts.

    Statistics and affine values of frozen norms are buffers and do not count, as in the paper's tables.
    """
    return sum(parameter.numel() for parameter in module.parameters())


def executed_flops(model: Segmenter, size: tuple[int, int]) -> Flops:
    """Return the multiply-adds of a forward pass with one image of this height and width.

    `model` comes from `build_shapes` and is counted in its state at the end of training. The dense masks of the last
    layer are included; those of other layers are never computed.
    """
    total, backbone, pixel_decoder = _executed(model, size, ("", "backbone", "pixel_decoder"))
    return Flops(backbone, pixel_decoder, total - backbone - pixel_decoder)


def executed_flops_inside(model: Segmenter, size: tuple[int, int], part: str) -> float:
    """Return the multiply-adds inside the submodule `part` (a dotted name) for one image of this height and width.

    The model may call the submodule as a whole or its parts separately.
    """
    return _executed(model, size, (part,))[0]


def _executed(model: Segmenter, size: tuple[int, int], parts: Sequence[str]) -> list[float]:
    with torch.no_grad(), SHAPES_ONLY:
        model.set_progress(_AFTER_TRAINING, _AFTER_TRAINING)
        with _counter() as counter:
            model(torch.zeros(1, 3, *size)).mask_logits()
    # Names begin with the class name of the model.
    counts = {
        name.partition(".")[2]: sum(module_counts.values()) / 2
        for name, module_counts in counter.get_flop_counts().items()
    }
    return [_sum_part(counts, part) if part else counter.get_total_flops() / 2 for part in parts]


def _sum_part(counts: Mapping[str, float], part: str) -> float:
    """Sum the counts of a part of the model, whose modules may have been called separately."""
    names = {name for name in counts if f"{name}.".startswith(f"{part}.")}
    return sum(counts[name] for name in names if not any(name.startswith(f"{other}.") for other in names))


def executed_backbone_flops(backbone: Backbone, size: tuple[int, int]) -> float:
    """Return the multiply-adds of a `build_backbone_shapes` backbone for one image of this height and width."""
    with torch.no_grad(), SHAPES_ONLY, _counter() as counter:
        backbone(torch.zeros(1, 3, *size))
    return counter.get_total_flops() / 2


def _counter() -> FlopCounterMode:
    """Return a counter with additional formulas for norms, resizes and samples. It counts two per multiply-add."""
    aten = torch.ops.aten
    mapping: dict[Any, Callable[..., int]] = {
        aten.native_layer_norm: _per_input(NORM),
        aten.native_group_norm: _per_input(NORM),
        aten.addcmul: _per_output(BATCH_NORM),  # FrozenBatchNorm2d
        aten.native_batch_norm: _per_input(BATCH_NORM),
        aten.upsample_bilinear2d: _per_output(BILINEAR),
        aten.upsample_nearest2d: _per_output(NEAREST),
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._embedding_bag: _sampled_rows,
        aten._embedding_bag_forward_only: _sampled_rows,
        torch.ops.torchvision.deform_conv2d: _deformable_convolution,
    }
    # Before torch 2.12, the counter decomposes an operation unless its overload is listed.
    mapping |= {operation.default: count for operation, count in mapping.items()}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _per_input(cost: int) -> Callable[..., int]:
    def count(source: Size, *args: object, out_shape: object, **kwargs: object) -> int:
        return 2 * cost * math.prod(source)

    return count


def _per_output(cost: int) -> Callable[..., int]:
    def count(*args: object, out_shape: Size, **kwargs: object) -> int:
        return 2 * cost * math.prod(out_shape)

    return count


def _attention(query: Size, key: Size, value: Size, *args: object, out_shape: object, **kwargs: object) -> int:
    """Count the products of queries with keys and of weights with values."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _sampled_rows(table: Size, rows: Size, *args: object, out_shape: object, **kwargs: object) -> int:
    """Count the weighted sums of table rows: deformable attention on CPU."""
    return 2 * math.prod(rows) * table[-1]


def _deformable_convolution(source: Size, weight: Size, *args: object, out_shape: Size, **kwargs: object) -> int:
    return 2 * out_shape[0] * math.prod(out_shape[2:]) * math.prod(weight)
