"""Convert between settings and Hugging Face's `config.json` for Mask2Former and EoMT."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

from m2f.model.backbones.timm_names import without_tag
from m2f.model.config import (
    EomtDecoderConfig,
    LossConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    SwinBackboneConfig,
    TimmBackboneConfig,
    ViTAdapterBackboneConfig,
)
from m2f.model.errors import WeightsError
from m2f.model.export.eomt import EOMT_TYPES, eomt_values, read_eomt

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
"""File names used by transformers."""
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_RESNETS = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101"}
_WIDTHS = (256, 512, 1024, 2048)
"""Channels of the four stages of these ResNets."""
_EXPANSION = 4
"""Ratio of a bottleneck's output channels to its inner channels."""


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModel:
    """Description of the model in a folder, without its weights."""

    config: ModelConfig
    """Settings of the model."""
    labels: tuple[str, ...]
    """Names of the classes, in class order."""
    notes: Mapping[str, Any]
    """Notes given to `write_hugging_face_config`; empty if another program wrote the folder."""
    shortest_edge: int | None
    max_size: int | None
    """Length in pixels to which the shorter side of images is resized, and maximum length of the longer side. None if
    the folder states no size, or a fixed height and width."""


def is_hugging_face_folder(path: str | Path) -> bool:
    """Return whether a path is a folder with a `config.json`."""
    return os.path.isfile(Path(path) / CONFIG)  # in contrast to Path.is_file, False for a name that is too long


def known_labels(path: str | Path) -> tuple[str, ...] | None:
    """Return the class names of a Hugging Face Mask2Former or EoMT in class order; empty if the classes have no names.

    Return None if the path is not a folder of one of these models. Raises WeightsError if `config.json` cannot be read.
    """
    if not is_hugging_face_folder(path):
        return None
    values = _read_json(Path(path) / CONFIG)
    if values.get("model_type") not in ("mask2former", *EOMT_TYPES):
        return None
    labels = values.get("id2label") or {}
    if not _has_class_numbers(labels):
        return ()
    names = tuple(str(labels[str(i)]) for i in range(len(labels)))
    return () if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def _has_class_numbers(labels: object) -> bool:
    return isinstance(labels, dict) and set(labels) == {str(i) for i in range(len(labels))}


def read_hugging_face_config(folder: str | Path) -> HuggingFaceModel:
    """Return the settings of the model in a folder that `save_pretrained` wrote.

    Raises WeightsError for another kind of model, or for one with unsupported settings.
    """
    path = Path(folder) / CONFIG
    values = _read_json(path)
    known = ("mask2former", *EOMT_TYPES)
    if (kind := values.get("model_type")) not in known:
        raise WeightsError(f"{path}: model_type is {kind!r}; only {', '.join(known)} are supported")
    parts = read_eomt(path, values) if kind in EOMT_TYPES else _read_mask2former(path, _DEFAULTS | values)
    values = _DEFAULTS | values
    labels = values.get("id2label") or {str(i): f"LABEL_{i}" for i in range(2)}
    if not _has_class_numbers(labels):
        raise WeightsError(f"{path}: id2label is {str(labels)[:80]}; its keys must be the class numbers from 0")
    preprocessor = Path(folder) / PREPROCESSOR
    pixels = _read_json(preprocessor) if preprocessor.is_file() else {}
    defaults = ModelConfig()
    config = ModelConfig(
        **parts,
        loss=LossConfig(
            class_weight=values["class_weight"],
            mask_weight=values["mask_weight"],
            dice_weight=values["dice_weight"],
            no_object_weight=values["no_object_weight"],
            num_points=values["train_num_points"],
            oversample_ratio=values["oversample_ratio"],
            importance_sample_ratio=values["importance_sample_ratio"],
        ),
        num_classes=len(labels),
        pixel_mean=_scaled(pixels.get("image_mean"), 255, defaults.pixel_mean),
        pixel_std=_scaled(pixels.get("image_std"), 255, defaults.pixel_std),
    )
    size = pixels.get("size")
    size = size if isinstance(size, dict) else {}
    return HuggingFaceModel(
        config=config,
        labels=tuple(labels[str(i)] for i in range(len(labels))),
        notes=values.get("m2f") or {},
        shortest_edge=size.get("shortest_edge"),
        max_size=size.get("longest_edge"),
    )


def class_in_transformers(folder: str | Path) -> str:
    """Return the name of the class that opens a folder, as `write_hugging_face_config` stores it.

    Raises WeightsError if `config.json` cannot be read.
    """
    return str(_read_json(Path(folder) / CONFIG)["architectures"][0])


def _read_mask2former(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return backbone, pixel decoder and transformer decoder of a Mask2Former."""
    _require(path, values, _SUPPORTED)
    return {
        "backbone": _read_backbone(path, values.get("backbone_config") or {}),
        "pixel_decoder": MSDeformAttnPixelDecoderConfig(
            conv_dim=values["feature_size"],
            mask_dim=values["mask_feature_size"],
            num_layers=values["encoder_layers"],
            num_heads=values["num_attention_heads"],
            feedforward_dim=values["encoder_feedforward_dim"],
        ),
        "transformer_decoder": MaskedTransformerDecoderConfig(
            num_queries=values["num_queries"],
            num_layers=values["decoder_layers"] - 1,  # decoder_layers also counts the learnable queries
            hidden_dim=values["hidden_dim"],
            num_heads=values["num_attention_heads"],
            feedforward_dim=values["dim_feedforward"],
            dropout=values["dropout"],
        ),
    }


def write_hugging_face_config(
    folder: Path,
    config: ModelConfig,
    labels: Sequence[str],
    notes: Mapping[str, Any],
    shortest_edge: int,
    max_size: int,
) -> None:
    """Write `config.json` and `preprocessor_config.json`. The notes are stored under the key `m2f`.

    Raises WeightsError for settings that Hugging Face's Mask2Former or EoMT does not have.
    """
    is_eomt = isinstance(config.transformer_decoder, EomtDecoderConfig)
    loss = config.loss
    values = (eomt_values(config) if is_eomt else _mask2former_values(config)) | {
        "no_object_weight": loss.no_object_weight,
        "class_weight": loss.class_weight,
        "mask_weight": loss.mask_weight,
        "dice_weight": loss.dice_weight,
        "train_num_points": loss.num_points,
        "oversample_ratio": loss.oversample_ratio,
        "importance_sample_ratio": loss.importance_sample_ratio,
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
        "m2f": dict(notes),
    }
    preprocessor = {
        "image_processor_type": f"{'Eomt' if is_eomt else 'Mask2Former'}ImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": shortest_edge, "longest_edge": max_size},
        "size_divisor": 32,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _scaled(config.pixel_mean, 1 / 255, config.pixel_mean),
        "image_std": _scaled(config.pixel_std, 1 / 255, config.pixel_std),
        "num_labels": len(labels),
    }
    for name, content in ((CONFIG, values), (PREPROCESSOR, preprocessor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _mask2former_values(config: ModelConfig) -> dict[str, Any]:
    """Return the values of `config.json` that describe the model."""
    pixels, queries = config.pixel_decoder, config.transformer_decoder
    if not isinstance(pixels, MSDeformAttnPixelDecoderConfig):
        raise WeightsError(
            f"model.pixel_decoder.kind is {pixels.kind}; Hugging Face's Mask2Former supports only ms_deform_attn"
        )
    if not isinstance(queries, MaskedTransformerDecoderConfig):
        raise WeightsError(
            f"model.transformer_decoder.kind is {queries.kind}; Hugging Face's Mask2Former supports only masked"
        )
    _require_supported(queries, pixels)
    return _DEFAULTS | {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": _write_backbone(config),
        "feature_size": pixels.conv_dim,
        "mask_feature_size": pixels.mask_dim,
        "hidden_dim": queries.hidden_dim,
        "encoder_feedforward_dim": pixels.feedforward_dim,
        "encoder_layers": pixels.num_layers,
        "decoder_layers": queries.num_layers + 1,
        "num_attention_heads": queries.num_heads,
        "dropout": queries.dropout,
        "dim_feedforward": queries.feedforward_dim,
        "num_queries": queries.num_queries,
    }


_SUPPORTED = {
    "activation_function": "relu",
    "common_stride": 4,
    "feature_strides": [4, 8, 16, 32],
    "pre_norm": False,
    "enforce_input_projection": False,
}
"""Settings that the library lets users change, with the only values supported here."""

_DEFAULTS: dict[str, Any] = {
    **_SUPPORTED,
    "feature_size": 256,
    "mask_feature_size": 256,
    "hidden_dim": 256,
    "encoder_feedforward_dim": 1024,
    "encoder_layers": 6,
    "decoder_layers": 10,
    "num_attention_heads": 8,
    "dropout": 0.0,
    "dim_feedforward": 2048,
    "num_queries": 100,
    "no_object_weight": 0.1,
    "class_weight": 2.0,
    "mask_weight": 5.0,
    "dice_weight": 5.0,
    "train_num_points": 12544,
    "oversample_ratio": 3.0,
    "importance_sample_ratio": 0.75,
    "init_std": 0.02,
    "init_xavier_std": 1.0,
    "use_auxiliary_loss": True,
    "ignore_value": 255,
}
"""The library's defaults, which older files leave out."""

# Supported values of the two kinds of backbones.
_SUPPORTED_SWIN = {
    "patch_size": 4,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "use_absolute_embeddings": False,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "out_features": _STAGES,
}
_SUPPORTED_RESNET = {
    "embedding_size": 64,
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
    "out_features": _STAGES,
}


def _read_backbone(path: Path, values: Mapping[str, Any]) -> TimmBackboneConfig | SwinBackboneConfig:
    kind = values.get("model_type")
    try:
        if kind == "swin":
            _require(path, _SUPPORTED_SWIN | dict(values), _SUPPORTED_SWIN, "backbone_config.")
            return SwinBackboneConfig(
                embed_dim=values["embed_dim"],
                depths=tuple(values["depths"]),
                num_heads=tuple(values["num_heads"]),
                window_size=values["window_size"],
                drop_path=values.get("drop_path_rate", 0.1),
            )
        if kind == "resnet":
            _require(path, _SUPPORTED_RESNET | dict(values), _SUPPORTED_RESNET, "backbone_config.")
            depths, widths = tuple(values["depths"]), tuple(values["hidden_sizes"])
            if widths == _WIDTHS and depths in _RESNETS:
                return TimmBackboneConfig(name=_RESNETS[depths])
            channels = tuple(width // _EXPANSION for width in widths)
            return TimmBackboneConfig(name="resnet50", options={"layers": depths, "channels": channels})
    except KeyError as error:
        raise WeightsError(f"{path}: backbone_config.{error.args[0]} is missing") from error
    raise WeightsError(f"{path}: backbone_config.model_type is {kind!r}; only swin and resnet are supported")


def _write_backbone(config: ModelConfig) -> dict[str, Any]:
    backbone = config.backbone
    match backbone:
        case SwinBackboneConfig():
            return _SUPPORTED_SWIN | {
                "model_type": "swin",
                "embed_dim": backbone.embed_dim,
                "hidden_size": backbone.embed_dim * 8,
                "depths": list(backbone.depths),
                "num_heads": list(backbone.num_heads),
                "num_layers": len(backbone.depths),
                "window_size": backbone.window_size,
                "drop_path_rate": backbone.drop_path,
            }
        case TimmBackboneConfig():
            depths = next((d for d, name in _RESNETS.items() if name == without_tag(backbone.name)), None)
            unknown = sorted(set(backbone.options) - {"layers", "channels"})
            if depths is None or unknown or backbone.norm == "group":
                raise WeightsError(
                    f"model.backbone is {backbone.name!r} with norm {backbone.norm!r} and options "
                    f"{dict(backbone.options)}; Hugging Face's Mask2Former supports resnet50, resnet101 and kind swin"
                )
            channels = backbone.options.get("channels", tuple(width // _EXPANSION for width in _WIDTHS))
            return _SUPPORTED_RESNET | {
                "model_type": "resnet",
                "depths": list(backbone.options.get("layers", depths)),
                "hidden_sizes": [_EXPANSION * width for width in channels],
            }
        case ViTAdapterBackboneConfig():
            raise WeightsError("model.backbone.kind is vit_adapter, which Hugging Face's Mask2Former does not support")
        case _:
            assert_never(backbone)


def _require_supported(queries: MaskedTransformerDecoderConfig, pixels: MSDeformAttnPixelDecoderConfig) -> None:
    """Raise WeightsError if the transformer decoder is a variant that Hugging Face does not have."""
    plain = MaskedTransformerDecoderConfig()
    for name in ("attention", "features", "queries", "cross_attention_first", "pre_norm"):
        value, required = getattr(queries, name), getattr(plain, name)
        if value != required:
            raise WeightsError(
                f"model.transformer_decoder.{name} is {value!r}; Hugging Face's Mask2Former supports only {required!r}"
            )
    if pixels.num_points != 4:
        raise WeightsError(
            f"model.pixel_decoder.num_points is {pixels.num_points}; Hugging Face's Mask2Former supports only 4"
        )
    if pixels.conv_dim % 32:
        raise WeightsError(
            f"model.pixel_decoder.conv_dim is {pixels.conv_dim}; Hugging Face's Mask2Former supports only multiples of "
            "32, because its GroupNorms have 32 groups"
        )
    if queries.num_heads != pixels.num_heads:
        raise WeightsError(
            f"model.transformer_decoder.num_heads is {queries.num_heads} and model.pixel_decoder.num_heads is "
            f"{pixels.num_heads}; Hugging Face's Mask2Former uses one number for both"
        )


def _require(path: Path, values: Mapping[str, Any], required: Mapping[str, Any], prefix: str = "") -> None:
    for name, value in required.items():
        if values[name] != value:
            raise WeightsError(f"{path}: {prefix}{name} is {values[name]!r}; only {value!r} is supported")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object")
    return content


def _scaled(values: Sequence[float] | None, factor: float, default: Sequence[float]) -> tuple[float, float, float]:
    # Rounded so that 0.485 * 255 gives exactly 123.675.
    red, green, blue = default if values is None else (round(value * factor, 9) for value in values)
    return (red, green, blue)
