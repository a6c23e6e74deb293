"""Multiply-adds that our model executes on a CPU, counted while it runs on tensors without values."""

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
"""Shape of a tensor, as the counter hands it over."""

Module = TypeVar("Module", bound=nn.Module)

_END = 10**9
"""More steps than any training has."""
SHAPES_ONLY = FakeTensorMode()
"""Tensors made in it have no values. One mode for all models: tensors of two modes do not mix."""


def build_shapes(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Segmenter:
    """The recipe's model in evaluation mode with weights of `dtype`, with shapes but without values."""
    with torch.device("meta"):
        model = build_model(config, pretrained_backbone=False)
    return _on_fake_cpu(model.to(dtype)).eval()


def build_backbone_shapes(config: BackboneConfig) -> Backbone:
    """The recipe's backbone in evaluation mode, with shapes but without values."""
    with torch.device("meta"):
        backbone = build_backbone(config, pretrained=False)
    return _on_fake_cpu(backbone).eval()


def _on_fake_cpu(module: Module) -> Module:
    """Some initialisations work on the meta device only, and autocast everywhere but there."""
    with SHAPES_ONLY:
        return module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))


def count_parameters(module: nn.Module) -> int:
    """Numbers that training can change: frozen statistics are buffers and do not count, as in the paper's tables."""
    return sum(parameter.numel() for parameter in module.parameters())


def executed_flops(model: Segmenter, size: tuple[int, int]) -> Flops:
    """Multiply-adds of a forward pass of `build_shapes` with one image of this height and width.

    The dense masks of the last layer are part of it, those of other layers are never made. The model is one at the end
    of its training.
    """
    total, backbone, pixel_decoder = _executed(model, size, ("", "backbone", "pixel_decoder"))
    return Flops(backbone, pixel_decoder, total - backbone - pixel_decoder)


def executed_flops_inside(model: Segmenter, size: tuple[int, int], part: str) -> float:
    """Those of a submodule, which may be called part by part."""
    return _executed(model, size, (part,))[0]


def _executed(model: Segmenter, size: tuple[int, int], parts: Sequence[str]) -> list[float]:
    with torch.no_grad(), SHAPES_ONLY:
        model.set_progress(_END, _END)
        with _counter() as counter:
            model(torch.zeros(1, 3, *size)).mask_logits()
    # Names begin with the class of the model.
    counts = {name.partition(".")[2]: sum(of.values()) / 2 for name, of in counter.get_flop_counts().items()}
    return [_of_part(counts, part) if part else counter.get_total_flops() / 2 for part in parts]


def _of_part(counts: Mapping[str, float], part: str) -> float:
    """Of a part of the model by the counts of modules, which may have been called one by one."""
    names = {name for name in counts if f"{name}.".startswith(f"{part}.")}
    return sum(counts[name] for name in names if not any(name.startswith(f"{other}.") for other in names))


def executed_backbone_flops(backbone: Backbone, size: tuple[int, int]) -> float:
    """Multiply-adds of `build_backbone_shapes` for one image of this height and width."""
    with torch.no_grad(), SHAPES_ONLY, _counter() as counter:
        backbone(torch.zeros(1, 3, *size))
    return counter.get_total_flops() / 2


def _counter() -> FlopCounterMode:
    """Counts what torch counts, and norms, resizes and samples as the formulas do; two per multiply-add."""
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
    # Before torch 2.12 the counter takes an operation apart unless it is listed with its overload.
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
    """Products of queries with keys, and of weights with values."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _sampled_rows(table: Size, rows: Size, *args: object, out_shape: object, **kwargs: object) -> int:
    """Weighted sums of table rows: deformable attention on CPU."""
    return 2 * math.prod(rows) * table[-1]


def _deformable_convolution(source: Size, weight: Size, *args: object, out_shape: Size, **kwargs: object) -> int:
    return 2 * out_shape[0] * math.prod(out_shape[2:]) * math.prod(weight)
