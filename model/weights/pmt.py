"""Convert between the weight names of PMT's authors, whose files have no backbone, and ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from m2f.model.weights.eomt import eomt_to_authors, eomt_to_own
from m2f.model.weights.packing import attention_packs, pack, unpack
from m2f.model.weights.tables import NameTable

_AUTHORS, _OWN = "network.decoder", "transformer_decoder"
_ENCODER = "network.encoder."
_OBSOLETE = ("network.decoder.pe.", "network.bn_prefix.", "network.bn_patch.", "network._attn_mask_probs_fallback")
"""Name prefixes of modules that older files contain but the authors' code no longer has."""
_AUTHORS_BLOCK, _OWN_BLOCK = f"{_AUTHORS}.blocks.#", f"{_OWN}.blocks.#"
# Names of the authors (left) and ours (right), with separate attention projections.
_TABLE = NameTable(
    (f"{_AUTHORS}.q.*", f"{_OWN}.query_feat.*"),
    (f"{_AUTHORS}.class_head.*", f"{_OWN}.class_embed.*"),
    (f"{_AUTHORS}.mask_head.*", f"{_OWN}.mask_embed.*"),
    (f"{_AUTHORS}.attn_mask_probs", f"{_OWN}.attn_mask_probs"),
    (f"{_AUTHORS}.upscale.*", "pixel_decoder.*"),
    ("network.bn.#.*", f"{_OWN}.laterals.#.norm.*"),
    (f"{_AUTHORS}.lateral_projections.#.0.*", f"{_OWN}.laterals.#.fc1.*"),
    (f"{_AUTHORS}.lateral_projections.#.2.*", f"{_OWN}.laterals.#.fc2.*"),
    (f"{_AUTHORS}.scalers.#", f"{_OWN}.laterals.#.scale"),
    (f"{_AUTHORS}.decoder_norm.*", f"{_OWN}.norm.*"),
    *((f"{_AUTHORS_BLOCK}.norm{i}.*", f"{_OWN_BLOCK}.norm{i}.*") for i in (1, 2)),
    *((f"{_AUTHORS_BLOCK}.layer_scale{i}.lambda1", f"{_OWN_BLOCK}.gamma_{i}") for i in (1, 2)),
    (f"{_AUTHORS_BLOCK}.attention.q_proj.bias", f"{_OWN_BLOCK}.attn.q_bias"),
    (f"{_AUTHORS_BLOCK}.attention.v_proj.bias", f"{_OWN_BLOCK}.attn.v_bias"),
    (f"{_AUTHORS_BLOCK}.attention.o_proj.*", f"{_OWN_BLOCK}.attn.proj.*"),
    (f"{_AUTHORS_BLOCK}.attention.*", f"{_OWN_BLOCK}.attn.*"),
    (f"{_AUTHORS_BLOCK}.mlp.up_proj.*", f"{_OWN_BLOCK}.mlp.fc1.*"),
    (f"{_AUTHORS_BLOCK}.mlp.down_proj.*", f"{_OWN_BLOCK}.mlp.fc2.*"),
)


def is_pmt(names: Iterable[str]) -> bool:
    """Return whether these are names of PMT's authors."""
    return any(name.startswith(f"{_AUTHORS}.upscale.") for name in names)


def pmt_to_own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under our names, backbone included if the file has it. Names without a rule stay unchanged."""
    backbone = eomt_to_own({name: tensor for name, tensor in state.items() if name.startswith(_ENCODER)})
    decoder = {
        _TABLE.forward(name) or name: tensor
        for name, tensor in state.items()
        if not name.startswith((_ENCODER, *_OBSOLETE))
    }
    return backbone | pack(decoder, attention_packs(decoder))


def pmt_to_authors(own: Mapping[str, Tensor], *, backbone: bool = False) -> dict[str, Tensor]:
    """Return our weights under the authors' names. As in the published files, the backbone is left out by default."""
    parts = {name: tensor for name, tensor in own.items() if not name.startswith("backbone.")}
    state = {_TABLE.inverse(name) or name: tensor for name, tensor in unpack(parts, attention_packs(parts)).items()}
    if backbone:
        state |= eomt_to_authors({name: tensor for name, tensor in own.items() if name.startswith("backbone.")})
    return state
