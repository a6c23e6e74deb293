"""`python -m benchmarks.count_kernels [SIDE] [IMAGES]`: count the kernels that Inductor makes of a training step.

The compiled regions of the R50 model are traced as in `benchmarks.count_nodes`. Inductor lowers and fuses the graphs
for a CPU, but no code is generated. A GPU fuses by slightly different rules, so its counts may differ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as autograd_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode, Scheduler

from benchmarks.count_nodes import REGIONS, fake_tensors, run_regions
from m2f.model.config import ModelConfig
from m2f.model.mask2former import build_model


@dataclass(frozen=True)
class KernelCount:
    """Number of kernels in one graph."""

    generated: int
    """Kernels that Inductor generates by fusing operations."""
    library: int
    """Calls of libraries and of operators of our own: convolutions, products, attention."""

    def __str__(self) -> str:
        return f"{self.generated} + {self.library}"


@dataclass(frozen=True)
class RegionKernels:
    """Number of kernels in the forward and the backward graph of one region."""

    region: str
    forward: KernelCount
    backward: KernelCount


def count_regions(model: nn.Module, images: Callable[[], Tensor]) -> tuple[RegionKernels, ...]:
    """Compile the regions of a model and count their kernels.

    Call it in the context of `fake_tensors`. `images` creates the input of the model in the same context.
    """
    counts: dict[str, list[KernelCount]] = {name: [] for name in REGIONS}
    run_regions(model, images, {name: _counting_backend(counts[name]) for name in REGIONS})
    return tuple(RegionKernels(name, *counts[name]) for name in REGIONS)


def _counting_backend(counts: list[KernelCount]) -> Callable[..., Any]:
    """Return a backend that appends the count of the forward graph and later that of the backward graph."""

    def make_compiler(is_backward: bool) -> Callable[..., Any]:
        def count(graph: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
            counts.append(_count(graph, inputs, is_backward))
            return make_boxed_func(graph.forward)

        return count

    return aot_autograd(
        fw_compiler=make_compiler(is_backward=False),
        bw_compiler=make_compiler(is_backward=True),
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )


def _count(graph: fx.GraphModule, inputs: Sequence[object], is_backward: bool) -> KernelCount:
    """Let Inductor lower and fuse a copy of the graph, and stop it before it generates code."""
    nodes: list[BaseSchedulerNode] = []

    def stop(scheduler: Scheduler) -> None:
        nodes.extend(scheduler.nodes)
        raise RuntimeError("the nodes are counted")

    with (
        patch.object(Scheduler, "codegen", stop),
        inductor_config.patch(fx_graph_cache=False),
        suppress(InductorError),
    ):
        compile_fx_inner(deepcopy(graph), inputs, is_backward=is_backward)
    library = sum(isinstance(node, ExternKernelSchedulerNode) for node in nodes)
    without_work = sum(isinstance(node, NopKernelSchedulerNode) for node in nodes)
    results = sum(isinstance(node.node, MultiOutput) for node in nodes)  # one of several results of a call
    return KernelCount(len(nodes) - library - without_work, library - results)


def main(side: int = 1024, images: int = 2) -> None:
    """Print the counts of the R50 model for images of `side` x `side` pixels."""
    with fake_tensors(), autograd_config.patch(enable_autograd_cache=False):
        model = build_model(ModelConfig(num_classes=133), pretrained_backbone=False).train()
        counts = count_regions(
            model, lambda: torch.zeros(images, 3, side, side).contiguous(memory_format=torch.channels_last)
        )
    print(f"R50, {images} x {side} x {side}, torch {torch.__version__}: generated + library kernels")
    for count in counts:
        print(f"{count.region}: {count.forward} forward, {count.backward} backward")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
