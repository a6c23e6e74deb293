"""Tables of weight names: canonical names to ours, and Hugging Face's names to canonical ones.

`m2f.model.weights.names` defines canonical names and uses these tables.
"""

from __future__ import annotations

import re


class NameTable:
    """One-to-one renaming by pairs of templates, in which `#` stands for a number and `*` for the rest of the name.

    The first matching pair applies, so narrow templates come first.
    """

    def __init__(self, *pairs: tuple[str, str]) -> None:
        self._forward = [(_pattern(left), _replacement(right)) for left, right in pairs]
        self._inverse = [(_pattern(right), _replacement(left)) for left, right in pairs]

    def forward(self, name: str) -> str | None:
        """Return the right name for a left one, or None if no template matches."""
        return _rename(name, self._forward)

    def inverse(self, name: str) -> str | None:
        """Return the left name for a right one, or None if no template matches."""
        return _rename(name, self._inverse)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))


def _replacement(template: str) -> str:
    numbers = iter(range(1, 10))
    return re.sub(r"[#*]", lambda _: rf"\g<{next(numbers)}>", template)


def _rename(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, replacement in rules:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(replacement)
    return None


def _resnet_stages(left: str, right: str) -> list[tuple[str, str]]:
    """Return a pair of templates for each of four stages.

    `S` stands for res2 to res5 (left) and layer1 to layer4 (right).
    """
    return [(left.replace("S", f"res{i + 1}"), right.replace("S", f"layer{i}")) for i in range(1, 5)]


_CROSS = "sem_seg_head.predictor.transformer_cross_attention_layers.#"
_SELF = "sem_seg_head.predictor.transformer_self_attention_layers.#"
_FFN = "sem_seg_head.predictor.transformer_ffn_layers.#"
_PIXELS = "sem_seg_head.pixel_decoder"

# Canonical names (left) and ours (right).
CANONICAL_TO_OWN = NameTable(
    ("backbone.stem.conv1.norm.*", "backbone.body.bn1.*"),
    ("backbone.stem.conv1.*", "backbone.body.conv1.*"),
    *_resnet_stages("backbone.S.#.shortcut.norm.*", "backbone.body.S.#.downsample.1.*"),
    *_resnet_stages("backbone.S.#.shortcut.*", "backbone.body.S.#.downsample.0.*"),
    *_resnet_stages("backbone.S.#.conv#.norm.*", "backbone.body.S.#.bn#.*"),
    *_resnet_stages("backbone.S.#.conv#.*", "backbone.body.S.#.conv#.*"),
    ("backbone.patch_embed.*", "backbone.patch_embed.*"),  # our Swin has the official names
    ("backbone.layers.*", "backbone.layers.*"),
    ("backbone.norm#.*", "backbone.norm#.*"),
    (f"{_PIXELS}.input_proj.*", "pixel_decoder.input_proj.*"),
    (f"{_PIXELS}.transformer.level_embed", "pixel_decoder.level_embed"),
    (f"{_PIXELS}.transformer.encoder.layers.#.self_attn.*", "pixel_decoder.layers.#.attention.*"),
    (f"{_PIXELS}.transformer.encoder.layers.#.*", "pixel_decoder.layers.#.*"),
    (f"{_PIXELS}.adapter_1.norm.*", "pixel_decoder.lateral.1.*"),
    (f"{_PIXELS}.adapter_1.*", "pixel_decoder.lateral.0.*"),
    (f"{_PIXELS}.layer_1.norm.*", "pixel_decoder.output.1.*"),
    (f"{_PIXELS}.layer_1.*", "pixel_decoder.output.0.*"),
    (f"{_PIXELS}.mask_features.*", "pixel_decoder.mask_features.*"),
    (f"{_CROSS}.multihead_attn.q_proj.*", "transformer_decoder.layers.#.cross_query.*"),
    (f"{_CROSS}.multihead_attn.k_proj.*", "transformer_decoder.layers.#.cross_key.*"),
    (f"{_CROSS}.multihead_attn.v_proj.*", "transformer_decoder.layers.#.cross_value.*"),
    (f"{_CROSS}.multihead_attn.out_proj.*", "transformer_decoder.layers.#.cross.output.*"),
    (f"{_CROSS}.norm.*", "transformer_decoder.layers.#.cross.norm.*"),
    (f"{_SELF}.self_attn.q_proj.*", "transformer_decoder.layers.#.self_query.*"),
    (f"{_SELF}.self_attn.k_proj.*", "transformer_decoder.layers.#.self_key.*"),
    (f"{_SELF}.self_attn.v_proj.*", "transformer_decoder.layers.#.self_value.*"),
    (f"{_SELF}.self_attn.out_proj.*", "transformer_decoder.layers.#.self_attention.output.*"),
    (f"{_SELF}.norm.*", "transformer_decoder.layers.#.self_attention.norm.*"),
    (f"{_FFN}.*", "transformer_decoder.layers.#.*"),
    ("sem_seg_head.predictor.decoder_norm.*", "transformer_decoder.norm.*"),
    ("sem_seg_head.predictor.input_proj.#.*", "transformer_decoder.memories.#.input_proj.*"),
    ("sem_seg_head.predictor.mask_embed.layers.0.*", "transformer_decoder.mask_embed.0.*"),
    ("sem_seg_head.predictor.mask_embed.layers.1.*", "transformer_decoder.mask_embed.2.*"),
    ("sem_seg_head.predictor.mask_embed.layers.2.*", "transformer_decoder.mask_embed.4.*"),
    *((f"sem_seg_head.predictor.{n}.*", f"transformer_decoder.{n}.*") for n in ("query_feat", "query_embed")),
    *((f"sem_seg_head.predictor.{n}.*", f"transformer_decoder.{n}.*") for n in ("level_embed", "class_embed")),
)

_HF_ENCODER = "model.pixel_level_module.encoder"
_HF_STAGE = f"{_HF_ENCODER}.encoder.stages"
_HF_SWIN_BLOCK = f"{_HF_ENCODER}.encoder.layers.#.blocks.#"
_HF_PIXELS = "model.pixel_level_module.decoder"
_HF_QUERIES = "model.transformer_module"
_HF_LAYER = f"{_HF_QUERIES}.decoder.layers.#"


def _hugging_face_resnet() -> list[tuple[str, str]]:
    """Return pairs for convolutions and their norms. Hugging Face counts stages and convolutions from zero."""
    pairs = [(f"{_HF_ENCODER}.embedder.embedder", "backbone.stem.conv1")]
    for stage in range(4):
        pairs.append((f"{_HF_STAGE}.{stage}.layers.#.shortcut", f"backbone.res{stage + 2}.#.shortcut"))
        for conv in range(3):
            ours = f"backbone.res{stage + 2}.#.conv{conv + 1}"
            pairs.append((f"{_HF_STAGE}.{stage}.layers.#.layer.{conv}", ours))
    return [
        pair
        for theirs, ours in pairs
        for pair in ((f"{theirs}.normalization.*", f"{ours}.norm.*"), (f"{theirs}.convolution.*", f"{ours}.*"))
    ]


# Names of Hugging Face's files (left) and canonical names (right).
HUGGING_FACE_TO_CANONICAL = NameTable(
    *_hugging_face_resnet(),
    (f"{_HF_ENCODER}.embeddings.patch_embeddings.projection.*", "backbone.patch_embed.proj.*"),
    (f"{_HF_ENCODER}.embeddings.norm.*", "backbone.patch_embed.norm.*"),
    (f"{_HF_SWIN_BLOCK}.layernorm_before.*", "backbone.layers.#.blocks.#.norm1.*"),
    (f"{_HF_SWIN_BLOCK}.layernorm_after.*", "backbone.layers.#.blocks.#.norm2.*"),
    (f"{_HF_SWIN_BLOCK}.attention.self.query.*", "backbone.layers.#.blocks.#.attn.q_proj.*"),
    (f"{_HF_SWIN_BLOCK}.attention.self.key.*", "backbone.layers.#.blocks.#.attn.k_proj.*"),
    (f"{_HF_SWIN_BLOCK}.attention.self.value.*", "backbone.layers.#.blocks.#.attn.v_proj.*"),
    (f"{_HF_SWIN_BLOCK}.attention.output.dense.*", "backbone.layers.#.blocks.#.attn.proj.*"),
    (f"{_HF_SWIN_BLOCK}.attention.self.*", "backbone.layers.#.blocks.#.attn.*"),
    (f"{_HF_SWIN_BLOCK}.intermediate.dense.*", "backbone.layers.#.blocks.#.mlp.fc1.*"),
    (f"{_HF_SWIN_BLOCK}.output.dense.*", "backbone.layers.#.blocks.#.mlp.fc2.*"),
    (f"{_HF_ENCODER}.encoder.layers.#.downsample.*", "backbone.layers.#.downsample.*"),
    *((f"{_HF_ENCODER}.hidden_states_norms.stage{i + 1}.*", f"backbone.norm{i}.*") for i in range(4)),
    (f"{_HF_PIXELS}.input_projections.*", f"{_PIXELS}.input_proj.*"),
    (f"{_HF_PIXELS}.level_embed", f"{_PIXELS}.transformer.level_embed"),
    (f"{_HF_PIXELS}.encoder.layers.#.self_attn.*", f"{_PIXELS}.transformer.encoder.layers.#.self_attn.*"),
    (f"{_HF_PIXELS}.encoder.layers.#.self_attn_layer_norm.*", f"{_PIXELS}.transformer.encoder.layers.#.norm1.*"),
    (f"{_HF_PIXELS}.encoder.layers.#.final_layer_norm.*", f"{_PIXELS}.transformer.encoder.layers.#.norm2.*"),
    (f"{_HF_PIXELS}.encoder.layers.#.fc#.*", f"{_PIXELS}.transformer.encoder.layers.#.linear#.*"),
    (f"{_HF_PIXELS}.adapter_1.1.*", f"{_PIXELS}.adapter_1.norm.*"),
    (f"{_HF_PIXELS}.adapter_1.0.*", f"{_PIXELS}.adapter_1.*"),
    (f"{_HF_PIXELS}.layer_1.1.*", f"{_PIXELS}.layer_1.norm.*"),
    (f"{_HF_PIXELS}.layer_1.0.*", f"{_PIXELS}.layer_1.*"),
    (f"{_HF_PIXELS}.mask_projection.*", f"{_PIXELS}.mask_features.*"),
    (f"{_HF_LAYER}.cross_attn.*", f"{_CROSS}.multihead_attn.*"),
    (f"{_HF_LAYER}.cross_attn_layer_norm.*", f"{_CROSS}.norm.*"),
    (f"{_HF_LAYER}.self_attn.*", f"{_SELF}.self_attn.*"),
    (f"{_HF_LAYER}.self_attn_layer_norm.*", f"{_SELF}.norm.*"),
    (f"{_HF_LAYER}.fc#.*", f"{_FFN}.linear#.*"),
    (f"{_HF_LAYER}.final_layer_norm.*", f"{_FFN}.norm.*"),
    (f"{_HF_QUERIES}.decoder.layernorm.*", "sem_seg_head.predictor.decoder_norm.*"),
    (f"{_HF_QUERIES}.decoder.mask_predictor.mask_embedder.#.0.*", "sem_seg_head.predictor.mask_embed.layers.#.*"),
    (f"{_HF_QUERIES}.queries_features.*", "sem_seg_head.predictor.query_feat.*"),
    (f"{_HF_QUERIES}.queries_embedder.*", "sem_seg_head.predictor.query_embed.*"),
    (f"{_HF_QUERIES}.level_embed.*", "sem_seg_head.predictor.level_embed.*"),
    (f"{_HF_QUERIES}.input_projections.*", "sem_seg_head.predictor.input_proj.*"),
    ("class_predictor.*", "sem_seg_head.predictor.class_embed.*"),
)
