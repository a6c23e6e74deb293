"""Rename the vision transformers of transformers, DINOv2 and DINOv3, to the names of timm."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from m2f.model.weights.packing import attention_packs, pack
from m2f.model.weights.tables import NameTable

# Names of transformers (left) and of timm (right), with separate attention projections.
_EMBEDDINGS = (("embeddings.cls_token", "cls_token"), ("embeddings.register_tokens", "reg_token"))
_DINOV3 = NameTable(
    *_EMBEDDINGS,
    ("embeddings.patch_embeddings.*", "patch_embed.proj.*"),
    *((f"layer.#.layer_scale{i}.lambda1", f"blocks.#.gamma_{i}") for i in (1, 2)),
    *((f"layer.#.attention.{i}_proj.bias", f"blocks.#.attn.{i}_bias") for i in ("q", "v")),
    ("layer.#.attention.o_proj.*", "blocks.#.attn.proj.*"),
    ("layer.#.attention.*", "blocks.#.attn.*"),
    ("layer.#.mlp.gate_proj.*", "blocks.#.mlp.fc1_g.*"),
    ("layer.#.mlp.up_proj.*", "blocks.#.mlp.fc1.*"),
    ("layer.#.mlp.down_proj.*", "blocks.#.mlp.fc2.*"),
    ("layer.#.*", "blocks.#.*"),
)
_DINOV2 = NameTable(
    *_EMBEDDINGS,
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.*", "patch_embed.proj.*"),
    *((f"encoder.layer.#.layer_scale{i}.lambda1", f"blocks.#.ls{i}.gamma") for i in (1, 2)),
    *(
        (f"encoder.layer.#.attention.attention.{theirs}.*", f"blocks.#.attn.{ours}_proj.*")
        for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"))
    ),
    ("encoder.layer.#.attention.output.dense.*", "blocks.#.attn.proj.*"),
    ("encoder.layer.#.mlp.weights_in.*", "blocks.#.mlp.fc1.*"),
    ("encoder.layer.#.mlp.weights_out.*", "blocks.#.mlp.fc2.*"),
    ("encoder.layer.#.*", "blocks.#.*"),
    ("layernorm.*", "norm.*"),
)


def is_transformers_vit(names: Collection[str]) -> bool:
    """Return whether these are names of Dinov2Model, Dinov2WithRegistersModel or DINOv3ViTModel in transformers."""
    return any(map(_is_dinov2, names)) or any(map(_is_dinov3, names))


def transformers_vit_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return these weights under timm's names. Names without a rule stay unchanged."""
    table = _DINOV2 if any(map(_is_dinov2, state)) else _DINOV3
    gated = any(".mlp.gate_proj." in name for name in state)
    renamed: dict[str, Tensor] = {}
    for theirs, tensor in state.items():
        if theirs == "embeddings.mask_token":  # used only to pretrain it
            continue
        name = table.forward(theirs.removeprefix("model.")) or theirs  # in memory, DINOv3's layers have this prefix
        renamed[name.replace(".mlp.fc1.", ".mlp.fc1_x.") if gated else name] = tensor
    if "reg_token" in renamed and "pos_embed" in renamed:  # timm's models with registers store no position of the class
        positions = renamed["pos_embed"]
        renamed["cls_token"] = renamed["cls_token"] + positions[:, :1]
        renamed["pos_embed"] = positions[:, 1:]
    return pack(renamed, attention_packs(renamed))


def _is_dinov2(name: str) -> bool:
    return name == "encoder.layer.0.attention.attention.query.weight"


def _is_dinov3(name: str) -> bool:
    return name.removeprefix("model.") == "layer.0.attention.o_proj.weight"
