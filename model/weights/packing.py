"""Packing of attention projections into one tensor, and unpacking."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

PackedNames = Mapping[str, tuple[str, ...]]
"""Name of each packed tensor, with the names of its parts, which are joined along the first axis."""

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""Order of the projections in a packed tensor."""


def attention_packs(names: Iterable[str]) -> PackedNames:
    """Return how the official layout packs projections: `qkv` in Swin, otherwise as in `nn.MultiheadAttention`.

    The names may be packed or unpacked.
    """
    packs: dict[str, tuple[str, ...]] = {}
    for name in names:
        match = re.fullmatch(r"(.+)\.(?:qkv\.|in_proj_|q_proj\.)(weight|bias)", name)
        if match:
            attention, kind = match.groups()
            packed = f"{attention}.qkv.{kind}" if attention.endswith(".attn") else f"{attention}.in_proj_{kind}"
            packs[packed] = tuple(f"{attention}.{projection}.{kind}" for projection in _PROJECTIONS)
    return packs


def pack(state: Mapping[str, Tensor], packs: PackedNames) -> dict[str, Tensor]:
    """Join the parts of every packed tensor whose parts are all present."""
    whole = {name: parts for name, parts in packs.items() if parts and all(part in state for part in parts)}
    packed = {part for parts in whole.values() for part in parts}
    joined = {name: torch.cat([state[part] for part in parts]) for name, parts in whole.items()}
    return {name: tensor for name, tensor in state.items() if name not in packed} | joined


def unpack(state: Mapping[str, Tensor], packs: PackedNames) -> dict[str, Tensor]:
    """Split packed tensors into their parts. Other tensors stay unchanged."""
    parts: dict[str, Tensor] = {}
    for name, tensor in state.items():
        names = packs.get(name, (name,))
        parts |= zip(names, tensor.chunk(len(names)), strict=True) if len(names) > 1 else {names[0]: tensor}
    return parts
