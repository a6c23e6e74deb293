"""Convert between the weight names of DINOv3's segmentation head (ViT-Adapter and Mask2Former) and ours.

The head equals that of the official Mask2Former under other names, so its tensors are converted through the canonical
names. The published file has no vision transformer, which is published separately.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from m2f.model.errors import WeightsError
from m2f.model.weights.tables import NameTable

_AUTHORS_BACKBONE = "segmentation_model.0"
_AUTHORS_VIT = f"{_AUTHORS_BACKBONE}.backbone"
_AUTHORS_PIXELS = "segmentation_model.1.pixel_decoder"
_AUTHORS_QUERIES = "segmentation_model.1.predictor"
_PIXELS = "sem_seg_head.pixel_decoder"
_QUERIES = "sem_seg_head.predictor"
_UNUSED = re.compile(r"\.(bias_mask|mask_token|rope_embed\.periods)$|\.local_cls_norm\.")
"""Tensors of their vision transformer that we do not need: derived from settings, or used only to pretrain it."""
_BIAS = re.compile(r"(backbone\.vit\.blocks\.\d+\.attn)\.qkv\.bias")

# Their names (left) and ours (right).
_BACKBONE = NameTable(
    *(
        (f"{_AUTHORS_VIT}.{theirs}", f"backbone.vit.embed.{ours}")
        for theirs, ours in (
            ("cls_token", "cls_token"),
            ("storage_tokens", "reg_token"),
            ("patch_embed.proj.*", "proj.*"),
        )
    ),
    (f"{_AUTHORS_VIT}.norm.*", "backbone.vit.norm.*"),
    *((f"{_AUTHORS_VIT}.blocks.#.ls{i}.gamma", f"backbone.vit.blocks.#.gamma_{i}") for i in (1, 2)),
    (f"{_AUTHORS_VIT}.blocks.#.mlp.w1.*", "backbone.vit.blocks.#.mlp.fc1_g.*"),
    (f"{_AUTHORS_VIT}.blocks.#.mlp.w2.*", "backbone.vit.blocks.#.mlp.fc1_x.*"),
    (f"{_AUTHORS_VIT}.blocks.#.*", "backbone.vit.blocks.#.*"),
    (f"{_AUTHORS_BACKBONE}.spm.*", "backbone.prior.*"),
    (f"{_AUTHORS_BACKBONE}.interactions.#.extractor.ffn.dwconv.dwconv.*", "backbone.interactions.#.0.ffn.dwconv.*"),
    (f"{_AUTHORS_BACKBONE}.interactions.#.extractor.*", "backbone.interactions.#.0.*"),
    *(
        (
            f"{_AUTHORS_BACKBONE}.interactions.#.extra_extractors.{i}.ffn.dwconv.dwconv.*",
            f"backbone.interactions.#.{i + 1}.ffn.dwconv.*",
        )
        for i in (0, 1)
    ),
    *(
        (f"{_AUTHORS_BACKBONE}.interactions.#.extra_extractors.{i}.*", f"backbone.interactions.#.{i + 1}.*")
        for i in (0, 1)
    ),
    *((f"{_AUTHORS_BACKBONE}.norm{i + 1}.*", f"backbone.norms.{i}.*") for i in range(4)),
    (f"{_AUTHORS_BACKBONE}.level_embed", "backbone.level_embed"),
    (f"{_AUTHORS_BACKBONE}.up.*", "backbone.up.*"),
)
# Their names (left) and canonical ones (right).
_HEAD = NameTable(
    (f"{_AUTHORS_PIXELS}.input_convs.*", f"{_PIXELS}.input_proj.*"),
    (f"{_AUTHORS_PIXELS}.encoder.level_encoding", f"{_PIXELS}.transformer.level_embed"),
    (f"{_AUTHORS_PIXELS}.encoder.encoder.*", f"{_PIXELS}.transformer.encoder.*"),
    (f"{_AUTHORS_PIXELS}.lateral_convs.0.*", f"{_PIXELS}.adapter_1.*"),
    (f"{_AUTHORS_PIXELS}.output_convs.0.*", f"{_PIXELS}.layer_1.*"),
    (f"{_AUTHORS_PIXELS}.mask_feature.*", f"{_PIXELS}.mask_features.*"),
    (f"{_AUTHORS_QUERIES}.post_norm.*", f"{_QUERIES}.decoder_norm.*"),
    (f"{_AUTHORS_QUERIES}.*", f"{_QUERIES}.*"),
)


def is_dinov3(names: Iterable[str]) -> bool:
    """Return whether these are names of DINOv3's segmentation head."""
    return any(name.startswith("segmentation_model.") for name in names)


def lacks_vit(names: Iterable[str]) -> bool:
    """Return whether these are names of DINOv3's head without the vision transformer, as published."""
    names = tuple(names)
    return is_dinov3(names) and not any(name.startswith(f"{_AUTHORS_VIT}.") for name in names)


def dinov3_to_canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the head under canonical names and the backbone under ours. Names without a rule stay unchanged."""
    renamed: dict[str, Tensor] = {}
    for theirs, tensor in state.items():
        name = _BACKBONE.forward(theirs) or _HEAD.forward(theirs) or theirs
        name = re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", name)
        if (attention := _BIAS.fullmatch(name)) is None:
            renamed |= {} if _UNUSED.search(name) else {name: tensor}
            continue
        query, _, value = tensor.chunk(3)  # the bias of the keys is always 0; their file masks it
        renamed |= {f"{attention[1]}.q_bias": query, f"{attention[1]}.v_bias": value}
    return renamed


def backbone_to_dinov3(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our backbone under their names. Raises WeightsError if DINOv3 has no such backbone."""
    gated = any(".mlp.fc1_g." in name for name in own)
    state: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if name.endswith(".v_bias"):
            continue
        if name.endswith(".q_bias"):
            packed = name.removesuffix("q_bias") + "qkv.bias"
            rows = (tensor, torch.zeros_like(tensor), own[name.removesuffix("q_bias") + "v_bias"])
            mask = (torch.ones_like(tensor), torch.zeros_like(tensor), torch.ones_like(tensor))
            state |= {_renamed(packed): torch.cat(rows), f"{_renamed(packed)}_mask": torch.cat(mask)}
            continue
        theirs = _renamed(name)
        state[theirs.replace(".mlp.fc2.", ".mlp.w3.") if gated else theirs] = tensor
    return state


def head_to_dinov3(canonical: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the head under their names, from canonical names with projections packed as in the official code.

    Raises WeightsError if a weight has no counterpart.
    """
    names = {name: _HEAD.inverse(name) for name in canonical}
    if unknown := [name for name, theirs in names.items() if theirs is None]:
        raise WeightsError(f"{len(unknown)} weights have no counterpart in DINOv3's head, for example {unknown[0]}")
    return {theirs: canonical[name] for name, theirs in names.items() if theirs is not None}


def _renamed(own: str) -> str:
    theirs = _BACKBONE.inverse(own)
    if theirs is None or own.endswith("pos_embed"):
        raise WeightsError(f"{own} has no counterpart in DINOv3; model.backbone.name must be a DINOv3 transformer")
    return theirs
