"""Projections of attention, packed into one tensor or one by one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

PackedNames = Mapping[str, tuple[str, ...]]
"""Name of a packed tensor and the names of its parts, joined along the first axis."""

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""In the order in which packed projections hold them."""


def attention_packs(names: Iterable[str]) -> PackedNames:
    """How the official layout packs projections, packed or not yet: `qkv` in Swin, else as `nn.MultiheadAttention`."""
    packs: dict[str, tuple[str, ...]] = {}
    for name in names:
        match = re.fullmatch(r"(.+)\.(?:qkv\.|in_proj_|q_proj\.)(weight|bias)", name)
        if match:
            attention, kind = match.groups()
            packed = f"{attention}.qkv.{kind}" if attention.endswith(".attn") else f"{attention}.in_proj_{kind}"
            packs[packed] = tuple(f"{attention}.{projection}.{kind}" for projection in _PROJECTIONS)
    return packs


def pack(state: Mapping[str, Tensor], packs: PackedNames) -> dict[str, Tensor]:
    """Join the parts that are all there."""
    whole = {name: parts for name, parts in packs.items() if parts and all(part in state for part in parts)}
    packed = {part for parts in whole.values() for part in parts}
    joined = {name: torch.cat([state[part] for part in parts]) for name, parts in whole.items()}
    return {name: tensor for name, tensor in state.items() if name not in packed} | joined


def unpack(state: Mapping[str, Tensor], packs: PackedNames) -> dict[str, Tensor]:
    """Cut packed tensors into their parts; others stay as they are."""
    parts: dict[str, Tensor] = {}
    for name, tensor in state.items():
        names = packs.get(name, (name,))
        parts |= zip(names, tensor.chunk(len(names)), strict=True) if len(names) > 1 else {names[0]: tensor}
    return parts
