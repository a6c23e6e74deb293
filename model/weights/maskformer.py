"""Official checkpoints of MaskFormer (Cheng et al., NeurIPS 2021), Mask2Former's predecessor.

Its head is `pixel_decoder.kind` fpn or transformer_fpn with `transformer_decoder.kind` standard. The weights of its
backbones have the same names as in Mask2Former.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from m2f.model.errors import WeightsError
from m2f.model.weights.packing import PackedNames, attention_packs, pack, unpack
from m2f.model.weights.tables import CANONICAL_TO_OWN, NameTable

_PIXELS = "sem_seg_head.pixel_decoder"
_PREDICTOR = "sem_seg_head.predictor"
_ENCODER_LAYER = f"{_PIXELS}.transformer.encoder.layers.#"
_DECODER_LAYER = f"{_PREDICTOR}.transformer.decoder.layers.#"
_HEADS = ("pixel_decoder.", "transformer_decoder.")

_TO_OWN = NameTable(
    (f"{_PIXELS}.layer_4.norm.*", "pixel_decoder.fpn.top.1.*"),
    (f"{_PIXELS}.layer_4.*", "pixel_decoder.fpn.top.0.*"),
    *(
        pair
        for step, level in enumerate((3, 2, 1))
        for theirs, ours in ((f"adapter_{level}", f"steps.{step}.lateral"), (f"layer_{level}", f"steps.{step}.output"))
        for pair in (
            (f"{_PIXELS}.{theirs}.norm.*", f"pixel_decoder.fpn.{ours}.1.*"),
            (f"{_PIXELS}.{theirs}.*", f"pixel_decoder.fpn.{ours}.0.*"),
        )
    ),
    (f"{_PIXELS}.mask_features.*", "pixel_decoder.mask_features.*"),
    (f"{_PIXELS}.input_proj.*", "pixel_decoder.input_proj.*"),
    (f"{_ENCODER_LAYER}.self_attn.q_proj.*", "pixel_decoder.layers.#.query.*"),
    (f"{_ENCODER_LAYER}.self_attn.k_proj.*", "pixel_decoder.layers.#.key.*"),
    (f"{_ENCODER_LAYER}.self_attn.v_proj.*", "pixel_decoder.layers.#.value.*"),
    (f"{_ENCODER_LAYER}.self_attn.out_proj.*", "pixel_decoder.layers.#.attention.output.*"),
    (f"{_ENCODER_LAYER}.norm1.*", "pixel_decoder.layers.#.attention.norm.*"),
    (f"{_ENCODER_LAYER}.norm2.*", "pixel_decoder.layers.#.norm.*"),
    (f"{_ENCODER_LAYER}.linear#.*", "pixel_decoder.layers.#.linear#.*"),
    (f"{_DECODER_LAYER}.self_attn.q_proj.*", "transformer_decoder.layers.#.self_query.*"),
    (f"{_DECODER_LAYER}.self_attn.k_proj.*", "transformer_decoder.layers.#.self_key.*"),
    (f"{_DECODER_LAYER}.self_attn.v_proj.*", "transformer_decoder.layers.#.self_value.*"),
    (f"{_DECODER_LAYER}.self_attn.out_proj.*", "transformer_decoder.layers.#.self_attention.output.*"),
    (f"{_DECODER_LAYER}.multihead_attn.q_proj.*", "transformer_decoder.layers.#.cross_query.*"),
    (f"{_DECODER_LAYER}.multihead_attn.k_proj.*", "transformer_decoder.layers.#.cross_key.*"),
    (f"{_DECODER_LAYER}.multihead_attn.v_proj.*", "transformer_decoder.layers.#.cross_value.*"),
    (f"{_DECODER_LAYER}.multihead_attn.out_proj.*", "transformer_decoder.layers.#.cross.output.*"),
    (f"{_DECODER_LAYER}.norm1.*", "transformer_decoder.layers.#.self_attention.norm.*"),
    (f"{_DECODER_LAYER}.norm2.*", "transformer_decoder.layers.#.cross.norm.*"),
    (f"{_DECODER_LAYER}.norm3.*", "transformer_decoder.layers.#.norm.*"),
    (f"{_DECODER_LAYER}.linear#.*", "transformer_decoder.layers.#.linear#.*"),
    (f"{_PREDICTOR}.transformer.decoder.norm.*", "transformer_decoder.norm.*"),
    (f"{_PREDICTOR}.input_proj.*", "transformer_decoder.memory.input_proj.*"),
    (f"{_PREDICTOR}.query_embed.*", "transformer_decoder.query_embed.*"),
    (f"{_PREDICTOR}.class_embed.*", "transformer_decoder.class_embed.*"),
    *((f"{_PREDICTOR}.mask_embed.layers.{i}.*", f"transformer_decoder.mask_embed.{2 * i}.*") for i in range(3)),
)


def is_maskformer(official: Iterable[str]) -> bool:
    """Return whether these official names are those of MaskFormer or of another model in its code."""
    return any(name.startswith((f"{_PREDICTOR}.transformer.", f"{_PREDICTOR}.weight")) for name in official)


def maskformer_to_own(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under our names.

    Raises WeightsError for a model of MaskFormer's code that is not supported.
    """
    _reject_unsupported_variants(official)
    canonical = unpack(official, attention_packs(official))
    own = {_TO_OWN.forward(name) or CANONICAL_TO_OWN.forward(name) or name: t for name, t in canonical.items()}
    return pack(own, _own_packs(own))


def require_maskformer(own: Mapping[str, Tensor], target: Collection[str], source: str) -> None:
    """Raise WeightsError, with the settings to choose, if a MaskFormer's heads have other weights than the model's.

    Both have our names: `own` comes from `maskformer_to_own`, `target` are the weights of the model.
    """
    file, model = ({name for name in names if name.startswith(_HEADS)} for names in (own, target))
    if file == model:
        return
    pixels = "kind: fpn"
    if encoder_layers := _count_layers(own, "pixel_decoder"):
        pixels = f"kind: transformer_fpn, num_layers: {encoder_layers}"
    raise WeightsError(
        f"{source} is a MaskFormer; its heads have {len(file - model)} weights that this model lacks, and lack "
        f"{len(model - file)} that it has, for example {min(file ^ model)}; set model.pixel_decoder to {{{pixels}}} "
        f"and model.transformer_decoder to {{kind: standard, num_layers: {_count_layers(own, 'transformer_decoder')}}}"
    )


def _reject_unsupported_variants(official: Mapping[str, Tensor]) -> None:
    variant = None
    if f"{_PREDICTOR}.weight" in official or f"{_PREDICTOR}.class_embed.weight" not in official:
        variant = "per-pixel classification instead of masks (PerPixelBaselineHead)"
    elif any(name.startswith(f"{_PREDICTOR}.transformer.encoder.") for name in official):
        variant = "a transformer encoder inside the predictor (MODEL.MASK_FORMER.ENC_LAYERS above 0)"
    elif not any(name.startswith(f"{_PREDICTOR}.transformer.decoder.layers.0.self_attn.") for name in official):
        variant = "a decoder without self-attention (MaskFormerNoSAHead)"
    elif f"{_PIXELS}.transformer.encoder.norm.weight" in official:
        variant = "LayerNorms before the blocks (MODEL.MASK_FORMER.PRE_NORM)"
    if variant is not None:
        raise WeightsError(f"the weights are of a MaskFormer model with {variant}, which m2f does not support")


def _count_layers(own: Iterable[str], part: str) -> int:
    return len({match[1] for name in own if (match := re.match(rf"{part}\.layers\.(\d+)\.", name))})


def _own_packs(own: Iterable[str]) -> PackedNames:
    """Return how our model packs projections of MaskFormer.

    Keys and values of all decoder layers are one matrix each; queries and keys of a self-attention are one matrix.
    """
    own = tuple(own)
    packs = dict(attention_packs(name for name in own if name.startswith("backbone.")))
    decoder, encoder = "transformer_decoder.layers", "pixel_decoder.layers"
    layers = range(_count_layers(own, "transformer_decoder"))
    for kind in ("weight", "bias"):
        for role in ("key", "value"):
            parts = tuple(f"{decoder}.{layer}.cross_{role}.{kind}" for layer in layers)
            packs[f"transformer_decoder.memory.{role}.{kind}"] = parts
        for layer in layers:
            packs[f"{decoder}.{layer}.self_query_key.{kind}"] = (
                f"{decoder}.{layer}.self_query.{kind}",
                f"{decoder}.{layer}.self_key.{kind}",
            )
        for layer in range(_count_layers(own, "pixel_decoder")):
            packs[f"{encoder}.{layer}.query_key.{kind}"] = (
                f"{encoder}.{layer}.query.{kind}",
                f"{encoder}.{layer}.key.{kind}",
            )
    return packs
