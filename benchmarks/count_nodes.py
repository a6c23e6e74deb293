"""`python -m benchmarks.count_nodes [SIDE] [IMAGES]`: count the operations in the graphs of a training step.

The compiled regions of the R50 model are traced as by `training.compile`, in bfloat16 autocast and without tensor
values. The fused kernel of deformable attention is used as on GPUs. Views are not counted. Inductor usually generates
fewer kernels than the forward and backward counts, because it fuses neighbouring operations. The last lines count the
launches that an eager step saves because the model caches constant tensors between steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from m2f.model.backbones.batch_norms import FrozenBatchNorm2d
from m2f.model.config import ModelConfig
from m2f.model.deform_attn.module import MSDeformAttn, SamplingGrid
from m2f.model.mask2former import build_model
from m2f.model.position_encoding import sine_position_embedding

REGIONS = ("backbone", "pixel_decoder", "transformer_decoder")


@dataclass(frozen=True)
class RegionCount:
    """Number of operations in one region, without views."""

    region: str
    forward: int
    backward: int
    fused_attention: int
    """Forward operations that are fused kernels of deformable attention."""


def count_regions(model: nn.Module, images: Callable[[], Tensor]) -> tuple[RegionCount, ...]:
    """Compile the regions of a model and count their operations.

    Call it in the context of `fake_tensors`. `images` creates the input of the model in the same context.
    """
    graphs: dict[str, list[fx.GraphModule]] = {name: [] for name in REGIONS}
    run_regions(model, images, {name: _collect_graphs(graphs[name]) for name in REGIONS})
    return tuple(_count(name, graphs[name]) for name in REGIONS)


def run_regions(model: nn.Module, images: Callable[[], Tensor], backends: Mapping[str, Callable[..., Any]]) -> None:
    """Compile each region of a model with its backend, and run a forward and a backward pass in bfloat16 autocast."""
    for name, backend in backends.items():
        model.get_submodule(name).compile(backend=backend, dynamic=False, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        predictions = model(images())
    (predictions.class_logits.sum() + predictions.mask_embeddings.sum() + predictions.mask_features.sum()).backward()


def _collect_graphs(graphs: list[fx.GraphModule]) -> Callable[..., Any]:
    def collect(graph: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=collect, bw_compiler=collect)


def _count(region: str, graphs: Sequence[fx.GraphModule]) -> RegionCount:
    forward, backward = graphs
    attention = [node for node in forward.graph.nodes if str(node.target) == "m2f.ms_deform_attn.default"]
    return RegionCount(region, _count_launches(forward), _count_launches(backward), len(attention))


def _count_launches(graph: fx.GraphModule) -> int:
    return sum(
        isinstance(node.target, torch._ops.OpOverload) and not _is_view(node.target) for node in graph.graph.nodes
    )


def _is_view(operation: torch._ops.OpOverload) -> bool:
    return any(returned.alias_info is not None for returned in operation._schema.returns)


class OperationCounter(TorchDispatchMode):
    """Counts the operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        self.count += not _is_view(func)
        return func(*args, **(kwargs or {}))


def count_constants(model: nn.Module, side: int) -> dict[str, int]:
    """Count the launches with which one forward pass would build the tensors that are cached between steps.

    The level table inside the fused kernel's operator is not counted.
    """
    shapes = [(side // stride, side // stride) for stride in (32, 16, 8)]
    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    counts = {}
    with OperationCounter() as counter:
        for norm in norms:
            norm._make_scale_and_shift(torch.bfloat16)
    counts["frozen BatchNorms"] = counter.count
    with OperationCounter() as counter:
        for shape in shapes:
            sine_position_embedding(*shape, 256)
    counts["position embeddings of both decoders"] = 2 * counter.count
    with OperationCounter() as counter:
        SamplingGrid.of_pixels(shapes)
    counts["pixel centres"] = counter.count
    return counts


@contextmanager
def fake_tensors() -> Iterator[None]:
    """In this context, tensors have only shapes, and deformable attention uses its fused kernel."""
    with patch.object(MSDeformAttn, "_is_fused", lambda self, value: True), FakeTensorMode(allow_non_fake_inputs=True):
        yield


def main(side: int = 1024, images: int = 2) -> None:
    """Print the counts of the R50 model for images of `side` x `side` pixels."""
    with fake_tensors():
        model = build_model(ModelConfig(num_classes=133), pretrained_backbone=False).train()
        constants = count_constants(model, side)

        def batch() -> Tensor:
            return torch.zeros(images, 3, side, side).contiguous(memory_format=torch.channels_last)

        counts = count_regions(model, batch)
    print(f"R50, {images} x {side} x {side}, torch {torch.__version__}")
    for count in counts:
        print(f"{count.region}: {count.forward} forward, {count.backward} backward ({count.fused_attention} fused)")
    for name, number in constants.items():
        print(f"launches saved by keeping {name}: {number}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
