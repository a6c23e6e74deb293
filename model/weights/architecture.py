"""Whether a folder of Hugging Face holds the model that a recipe describes, and which settings would make it so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from m2f.model.config import ModelConfig, SwinBackboneConfig
from m2f.model.errors import WeightsError
from m2f.model.export.hugging_face import read_hugging_face_config

_SETTINGS = (
    "backbone.kind",
    "backbone.name",
    "backbone.features",
    "backbone.embed_dim",
    "backbone.depths",
    "backbone.num_heads",
    "backbone.options.layers",
    "backbone.options.channels",
    *(f"pixel_decoder.{name}" for name in ("kind", "conv_dim", "mask_dim", "num_layers", "num_heads", "num_points")),
    "pixel_decoder.feedforward_dim",
    *(f"transformer_decoder.{name}" for name in ("kind", "num_layers", "hidden_dim", "num_heads", "feedforward_dim")),
    "pixel_mean",
    "pixel_std",
)
"""What the weights depend on. Classes, queries and windows of Swin may be others: the loader deals with them."""
_PIXEL_TOLERANCE = 0.01
"""Difference of mean and deviation that says nothing: files state them in 0..1 with the precision of float32."""


def require_same_architecture(folder: Path, model: ModelConfig, source: str) -> None:
    """Raise WeightsError with the settings that differ between a recipe's model and the one in a folder."""
    stored = read_hugging_face_config(folder).config
    differing = [name for name in _SETTINGS if not _equal(_value(stored, name), _value(model, name))]
    if isinstance(stored.backbone, SwinBackboneConfig) != isinstance(model.backbone, SwinBackboneConfig):
        differing = [name for name in differing if not name.startswith("backbone.") or _value(stored, name) is not None]
    if differing:
        rows = [f"model.{name}: {_text(_value(stored, name))}, now {_text(_value(model, name))}" for name in differing]
        raise WeightsError(
            f"model.weights is {source}, which is another model than the recipe's; set these, or choose other "
            "weights (docs/models.md lists them):\n  " + "\n  ".join(rows)
        )


def _value(config: ModelConfig, name: str) -> object:
    """None where the section has no such setting."""
    value: object = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return tuple(value) if isinstance(value, list) else value


def _equal(first: object, second: object) -> bool:
    if isinstance(first, tuple) and isinstance(second, tuple) and any(isinstance(value, float) for value in first):
        return all(math.isclose(a, b, abs_tol=_PIXEL_TOLERANCE) for a, b in zip(first, second, strict=True))
    return first == second


def _text(value: object) -> str:
    return "not set" if value is None else str(list(value) if isinstance(value, tuple) else value)
