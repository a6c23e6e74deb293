"""Convert between three sets of weight names of EoMT: those of its authors, those of transformers, and ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from m2f.model.weights.packing import PackedNames, attention_packs, pack, unpack
from m2f.model.weights.tables import NameTable

_POSITIONS = "backbone.embed.pos_embed"
_AUTHORS_BACKBONE = "network.encoder.backbone"
_HEADS = (
    ("layernorm.*", "backbone.norm.*"),
    ("query.*", "transformer_decoder.query_feat.*"),
    ("class_predictor.*", "transformer_decoder.class_embed.*"),
    *((f"mask_head.fc{i + 1}.*", f"transformer_decoder.mask_embed.{2 * i}.*") for i in range(3)),
    ("upscale_block.block.#.layernorm2d.*", "pixel_decoder.#.norm.*"),
    ("upscale_block.block.#.*", "pixel_decoder.#.*"),
    ("attn_mask_probs", "transformer_decoder.attn_mask_probs"),
    ("embeddings.cls_token", "backbone.embed.cls_token"),
    ("embeddings.register_tokens", "backbone.embed.reg_token"),
    *((f"layers.#.norm{i}.*", f"backbone.blocks.#.norm{i}.*") for i in (1, 2)),
)
# Names of transformers (left) and ours (right), with separate attention projections.
_DINOV2 = NameTable(
    *_HEADS,
    ("embeddings.position_embeddings.weight", "backbone.embed.pos_embed"),
    ("embeddings.patch_embeddings.projection.*", "backbone.embed.proj.*"),
    *((f"layers.#.layer_scale{i}.lambda1", f"backbone.blocks.#.ls{i}.gamma") for i in (1, 2)),
    ("layers.#.attention.out_proj.*", "backbone.blocks.#.attn.proj.*"),
    ("layers.#.attention.*", "backbone.blocks.#.attn.*"),
    ("layers.#.mlp.down_proj.*", "backbone.blocks.#.mlp.down_proj.*"),
    ("layers.#.mlp.*", "backbone.blocks.#.mlp.*"),
)
_DINOV3 = NameTable(
    *_HEADS,
    ("embeddings.patch_embeddings.*", "backbone.embed.proj.*"),
    *((f"layers.#.layer_scale{i}.lambda1", f"backbone.blocks.#.gamma_{i}") for i in (1, 2)),
    ("layers.#.attention.q_proj.bias", "backbone.blocks.#.attn.q_bias"),
    ("layers.#.attention.v_proj.bias", "backbone.blocks.#.attn.v_bias"),
    ("layers.#.attention.o_proj.*", "backbone.blocks.#.attn.proj.*"),
    ("layers.#.attention.*", "backbone.blocks.#.attn.*"),
    ("layers.#.mlp.up_proj.*", "backbone.blocks.#.mlp.fc1.*"),
    ("layers.#.mlp.down_proj.*", "backbone.blocks.#.mlp.fc2.*"),
)
# Names of the authors (left) and of transformers (right).
_AUTHORS_HEADS = (
    (f"{_AUTHORS_BACKBONE}.norm.*", "layernorm.*"),
    ("network.q.*", "query.*"),
    ("network.class_head.*", "class_predictor.*"),
    *((f"network.mask_head.{2 * i}.*", f"mask_head.fc{i + 1}.*") for i in range(3)),
    ("network.upscale.#.norm.*", "upscale_block.block.#.layernorm2d.*"),
    ("network.upscale.#.*", "upscale_block.block.#.*"),
    ("network.attn_mask_probs", "attn_mask_probs"),
)
_AUTHORS_DINOV2 = NameTable(
    *_AUTHORS_HEADS,
    (f"{_AUTHORS_BACKBONE}.cls_token", "embeddings.cls_token"),
    (f"{_AUTHORS_BACKBONE}.reg_token", "embeddings.register_tokens"),
    (f"{_AUTHORS_BACKBONE}.pos_embed", "embeddings.position_embeddings.weight"),
    (f"{_AUTHORS_BACKBONE}.patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    (f"{_AUTHORS_BACKBONE}.blocks.#.attn.proj.*", "layers.#.attention.out_proj.*"),
    (f"{_AUTHORS_BACKBONE}.blocks.#.attn.*", "layers.#.attention.*"),
    *((f"{_AUTHORS_BACKBONE}.blocks.#.ls{i}.gamma", f"layers.#.layer_scale{i}.lambda1") for i in (1, 2)),
    (f"{_AUTHORS_BACKBONE}.blocks.#.*", "layers.#.*"),
)
_AUTHORS_DINOV3 = NameTable(
    *_AUTHORS_HEADS,
    (f"{_AUTHORS_BACKBONE}.patch_embed.*", "embeddings.*"),
    (f"{_AUTHORS_BACKBONE}.blocks.#.*", "layers.#.*"),
)


def is_eomt(names: Iterable[str]) -> bool:
    """Return whether these are names of EoMT's authors, or of `eomt` or `eomt_dinov3` in transformers."""
    return any(name.startswith(("network.upscale.", "upscale_block.")) for name in names)


def eomt_to_own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under our names. Names without a rule stay unchanged."""
    is_dinov3 = any(name.endswith(".attention.o_proj.weight") for name in state)
    authors, table = (_AUTHORS_DINOV3, _DINOV3) if is_dinov3 else (_AUTHORS_DINOV2, _DINOV2)
    own = {}
    for name, tensor in state.items():
        theirs = authors.forward(name) or name
        ours = (table.forward(theirs) or theirs).replace(".mlp.down_proj.", ".mlp.fc2.")
        own[ours] = tensor[None] if ours == _POSITIONS and tensor.ndim == 2 else tensor
    gates = [name.replace(".gate_proj.", ".fc1.") for name in own if ".mlp.gate_proj." in name]
    return pack(own, {**attention_packs(own), **_gated_packs(gates)})


def eomt_to_transformers(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights under the names of `eomt` or `eomt_dinov3` in transformers."""
    table, state = _table(own), {}
    gated = _gated_layers(own)
    for name, tensor in unpack(own, {**attention_packs(own), **_gated_packs(gated)}).items():
        ours = name.replace(".fc2.", ".down_proj.") if name.replace(".fc2.", ".fc1.") in gated else name
        state[table.inverse(ours) or ours] = tensor[0] if name == _POSITIONS else tensor
    return state


def eomt_to_authors(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights under the authors' names, backbone included."""
    table = _table(own)
    if table is _DINOV3:
        return {_AUTHORS_DINOV3.inverse(name) or name: tensor for name, tensor in eomt_to_transformers(own).items()}
    return {_AUTHORS_DINOV2.inverse(table.inverse(name) or name) or name: tensor for name, tensor in own.items()}


def _table(own: Iterable[str]) -> NameTable:
    return _DINOV3 if any(name.endswith(".gamma_1") for name in own) else _DINOV2


def _gated_layers(own: Mapping[str, Tensor]) -> list[str]:
    """Return the names of weights and biases of first MLP layers that hold both gate and value (SwiGLU).

    Such a layer has twice as many outputs as the second layer has inputs.
    """
    wide = []
    for name in own:
        second = own.get(name.rpartition(".")[0].replace(".mlp.fc1", ".mlp.fc2") + ".weight")
        if ".mlp.fc1." in name and second is not None and len(own[name]) == 2 * second.shape[1]:
            wide.append(name)
    return wide


def _gated_packs(names: Iterable[str]) -> PackedNames:
    """Return packs for gate and value: one matrix in timm, two in transformers."""
    return {name: (name.replace(".fc1.", ".gate_proj."), name.replace(".fc1.", ".up_proj.")) for name in names}
