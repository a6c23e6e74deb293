"""Export EoMT under its authors' names, and convert between its `config.json` in Hugging Face and settings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2f.model.backbones.plain_vit import PlainVit
from m2f.model.config import EomtDecoderConfig, ModelConfig, TimmBackboneConfig, UpscalePixelDecoderConfig
from m2f.model.errors import WeightsError
from m2f.model.segmenter import Segmenter
from m2f.model.weights.eomt import eomt_to_authors

EOMT_TYPES = ("eomt", "eomt_dinov3")
"""Types of these models in `config.json`: with DINOv2 and with DINOv3."""
_NAMES = {
    "eomt": {384: "vit_small_patch14_reg4_dinov2", 768: "vit_base_patch14_reg4_dinov2"}
    | {1024: "vit_large_patch14_reg4_dinov2", 1536: "vit_giant_patch14_reg4_dinov2"},
    "eomt_dinov3": {
        384: "vit_small_patch16_dinov3_qkvb",
        768: "vit_base_patch16_dinov3_qkvb",
        1024: "vit_large_patch16_dinov3_qkvb",
    },
}
"""timm names of the vision transformers, by width."""
_SHAPES = {384: (12, 6), 768: (12, 12), 1024: (24, 16), 1536: (40, 24)}
"""Blocks and heads of these models, by width."""
_SUPPORTED = {"hidden_act": "gelu", "num_channels": 3, "num_register_tokens": 4}
_DEFAULTS: dict[str, Any] = {
    **_SUPPORTED,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 640,
    "patch_size": 16,
    "mlp_ratio": 4,
    "intermediate_size": 4096,
    "use_swiglu_ffn": False,
    "use_gated_mlp": False,
    "num_upscale_blocks": 2,
    "num_blocks": 4,
    "num_queries": 200,
    "layer_norm_eps": 1e-6,
    "drop_path_rate": 0.0,
}
"""The library's defaults, which files may leave out."""


def export_eomt(model: Segmenter) -> OrderedDict[str, Tensor]:
    """Return weights under the names of EoMT's authors, on the CPU, with the backbone and the input normalisation.

    Weights of a DINOv3 are complete, not differences from the published ones.
    """
    state = OrderedDict(
        (name, tensor.cpu().contiguous()) for name, tensor in eomt_to_authors(model.state_dict()).items()
    )
    for name, values in (("pixel_mean", model.pixel_mean), ("pixel_std", model.pixel_std)):
        state[f"network.encoder.{name}"] = torch.tensor(values).view(1, 3, 1, 1) / 255
    return state


def read_eomt(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of backbone, pixel decoder and transformer decoder that a `config.json` describes.

    Raises WeightsError if a value is not supported.
    """
    values, kind = _DEFAULTS | dict(values), values["model_type"]
    patch, width = values["patch_size"], values["hidden_size"]
    if not isinstance(patch, int):
        raise WeightsError(f"{path}: patch_size is {patch!r}; it must be an integer")
    required = _SUPPORTED | {"num_upscale_blocks": max(1, patch.bit_length() - 3), "use_gated_mlp": False}
    if kind == "eomt_dinov3":
        required["use_swiglu_ffn"] = False
    for name, value in required.items():
        if values[name] != value:
            raise WeightsError(f"{path}: {name} is {values[name]!r}; only {value!r} is supported")
    name, gated = _NAMES[kind].get(width, _NAMES[kind][384]), values["use_swiglu_ffn"]
    name = _NAMES[kind][1536] if gated else name
    options: dict[str, Any] = {} if kind == "eomt_dinov3" else {"img_size": values["image_size"]}
    if patch != 16:
        options["patch_size"] = patch
    shape = values["num_hidden_layers"], values["num_attention_heads"]
    if _SHAPES.get(width) != shape or name != _NAMES[kind].get(width):
        options |= {"embed_dim": width, "depth": shape[0], "num_heads": shape[1]}
        if gated:
            options["mlp_ratio"] = 2 * (-(-int(8 * width / 3) // 8) * 8) / width
        elif kind == "eomt":
            options["mlp_ratio"] = float(values["mlp_ratio"])
        else:
            options["mlp_ratio"] = values["intermediate_size"] / width
    if values["drop_path_rate"]:
        options["drop_path_rate"] = values["drop_path_rate"]
    return {
        "backbone": TimmBackboneConfig(name=name, features="tokens", options=options),
        "pixel_decoder": UpscalePixelDecoderConfig(),
        "transformer_decoder": EomtDecoderConfig(num_queries=values["num_queries"], num_layers=values["num_blocks"]),
    }


def eomt_values(config: ModelConfig) -> dict[str, Any]:
    """Return the values of `config.json` that describe the model.

    Raises WeightsError if the library has no such model.
    """
    backbone, decoder = config.backbone, config.transformer_decoder
    assert isinstance(backbone, TimmBackboneConfig)
    with torch.device("meta"):
        vit = PlainVit(backbone, pretrained=False)
    attention, mlp = vit.blocks[0].attn, vit.blocks[0].mlp
    hidden, gated = mlp.fc2.in_features, mlp.fc1.out_features != mlp.fc2.in_features
    rows, columns = vit.embed.grid
    prefix = vit.embed.prefix - 1
    is_dinov3 = vit.embed.pos_embed is None
    if prefix != _SUPPORTED["num_register_tokens"] or (gated and is_dinov3) or (rows != columns and not is_dinov3):
        raise WeightsError(
            f"model.backbone is {backbone.name} with options {dict(backbone.options)}; Hugging Face's EoMT "
            "supports 4 registers, square images, and a gated MLP only with DINOv2. Export as torch_export or onnx"
        )
    side = rows * vit.embed.patch
    values = _DEFAULTS | {
        "model_type": "eomt_dinov3" if is_dinov3 else "eomt",
        "architectures": [f"{'EomtDinov3' if is_dinov3 else 'Eomt'}ForUniversalSegmentation"],
        "hidden_size": vit.width,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": attention.num_heads,
        "image_size": 640 if is_dinov3 and "img_size" not in backbone.options else side,
        "patch_size": vit.embed.patch,
        "layer_norm_eps": vit.norm.eps,
        "num_upscale_blocks": max(1, vit.embed.patch.bit_length() - 3),
        "num_blocks": getattr(decoder, "num_layers", 0),
        "num_queries": decoder.num_queries,
        "drop_path_rate": backbone.options.get("drop_path_rate", 0.0),
    }
    if is_dinov3:
        dinov3_values = {"intermediate_size": hidden, "query_bias": True, "key_bias": False, "value_bias": True}
        return {
            name: value for name, value in values.items() if name not in ("mlp_ratio", "use_swiglu_ffn")
        } | dinov3_values
    ratio = 4 if gated else hidden / vit.width
    return {name: value for name, value in values.items() if name not in ("intermediate_size", "use_gated_mlp")} | {
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "use_swiglu_ffn": gated,
    }
