"""Benchmark of masked cross-attention in one decoder layer, forward and backward, against `nn.MultiheadAttention`.

The peer gets a separate mask for every head, as in the published code, and its attention weights are discarded. Both
sides include the projections of queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Measurement, compare
from m2f.model.attention import ProjectedAttention

DIM, HEADS, QUERIES = 256, 8, 100
"""Channels, heads and queries of the paper's R50 model."""


def run(tiny: bool, device: torch.device) -> list[Measurement]:
    """Return one measurement per feature level and dtype, for two images of 1024 pixels (`tiny` on a CPU: 256)."""
    side = 256 if tiny and device.type == "cpu" else 1024
    repeats = 5 if device.type == "cpu" else 20
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float32)
    return [_case(2, side // stride, dtype, device, repeats) for stride in (32, 16, 8) for dtype in dtypes]


def _case(images: int, side: int, dtype: torch.dtype, device: torch.device, repeats: int) -> Measurement:
    torch.manual_seed(0)
    peer = nn.MultiheadAttention(DIM, HEADS, batch_first=True).to(device, dtype)
    attend = ProjectedAttention(DIM, HEADS, dropout=0.0).to(device, dtype)
    attend.output.load_state_dict(peer.out_proj.state_dict())
    query = torch.randn(images, QUERIES, DIM, device=device, dtype=dtype, requires_grad=True)
    pixels = torch.randn(images, side * side, DIM, device=device, dtype=dtype, requires_grad=True)
    allowed = torch.rand(images, QUERIES, side * side, device=device) < 0.3
    repeated = ~allowed[:, None].expand(-1, HEADS, -1, -1).flatten(0, 1)
    cotangent = torch.randn_like(query)
    weights, biases = peer.in_proj_weight.chunk(3), peer.in_proj_bias.chunk(3)

    def ours() -> Sequence[Tensor]:
        projected = [F.linear(x, w, b) for x, w, b in zip((query, pixels, pixels), weights, biases, strict=True)]
        output = attend(*projected, allowed[:, None])
        return output, *torch.autograd.grad(output, (query, pixels), cotangent)

    def official() -> Sequence[Tensor]:
        output = peer(query, pixels, pixels, attn_mask=repeated)[0]
        return output, *torch.autograd.grad(output, (query, pixels), cotangent)

    shape = f"{images} x {QUERIES} queries x {side * side} pixels"
    name = f"masked attention {str(dtype).removeprefix('torch.')}"
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    return compare(name, shape, ours, "nn.MultiheadAttention", official, tolerance, repeats, device, memory=True)
