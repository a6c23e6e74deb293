"""Check that weights belong to the model of a recipe, with the settings that differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from m2f.model.backbones.timm_names import without_tag
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
"""Settings that determine the weights. Classes, queries and Swin's window size may differ; the loader handles them."""
_PIXEL_TOLERANCE = 0.01
"""Largest difference of pixel mean or standard deviation (0 to 255) that is ignored. Files store both in 0..1 with
float32 precision."""


def require_same_architecture(folder: Path, model: ModelConfig, source: str) -> None:
    """Raise WeightsError if a recipe's model differs from the model in a folder.

    The message lists the settings that differ.
    """
    stored = read_hugging_face_config(folder).config
    differing = _differing(stored, model)
    if isinstance(stored.backbone, SwinBackboneConfig) != isinstance(model.backbone, SwinBackboneConfig):
        differing = [name for name in differing if not name.startswith("backbone.") or _value(stored, name) is not None]
    _require_none(differing, stored, model, source)


def require_stored_architecture(
    stored: Mapping[str, object], model: ModelConfig, source: str, setting: str = "model.weights"
) -> None:
    """Raise WeightsError if a recipe's model differs from `stored`, the `model` section of a recipe as parsed YAML.

    Settings that `stored` lacks are ignored, because it may be of another version of m2f. The message lists the
    settings that differ, and names the `setting` whose value is `source`.
    """
    differing = [name for name in _differing(stored, model) if _value(stored, name) is not None]
    _require_none(differing, stored, model, source, setting)


def _differing(stored: ModelConfig | Mapping[str, object], model: ModelConfig) -> list[str]:
    return [name for name in _SETTINGS if not _equal(_value(stored, name), _value(model, name))]


def _require_none(
    differing: Sequence[str],
    stored: ModelConfig | Mapping[str, object],
    model: ModelConfig,
    source: str,
    setting: str = "model.weights",
) -> None:
    if differing:
        rows = [f"model.{name}: {_text(_value(stored, name))} -> {_text(_value(model, name))}" for name in differing]
        raise WeightsError(
            f"{setting} is {source}, whose model differs from the recipe's (weights -> recipe); change these "
            "settings, or choose other weights (docs/models.md lists them):\n  " + "\n  ".join(rows)
        )


def _value(config: ModelConfig | Mapping[str, object], name: str) -> object:
    """Return the value of a setting, or None if the section does not have it."""
    value: object = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return tuple(value) if isinstance(value, list) else value


def _equal(first: object, second: object) -> bool:
    if isinstance(first, tuple) and isinstance(second, tuple) and any(isinstance(value, float) for value in first):
        return all(math.isclose(a, b, abs_tol=_PIXEL_TOLERANCE) for a, b in zip(first, second, strict=True))
    if isinstance(first, str) and isinstance(second, str):
        return without_tag(first) == without_tag(second)  # only names of timm models have tags
    return first == second


def _text(value: object) -> str:
    return "not set" if value is None else str(list(value) if isinstance(value, tuple) else value)
