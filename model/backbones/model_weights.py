"""Start a backbone from the weights of a whole model: a checkpoint of this project, or a published model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from m2f.model.errors import ConfigError, WeightsError
from m2f.model.weights.files import read_names, read_state
from m2f.model.weights.load import match_backbone_names
from m2f.model.weights.names import detect_layout, is_ignored, to_own_names
from m2f.model.weights.packages import weights_path

_PREFIX = "backbone."
_INNER = ("vit.", "body.model.")
"""Prefixes of a vision transformer in a backbone that adds layers to it: an adapter, or a feature pyramid."""
_STATISTICS = re.compile(r"\.running_(mean|var)$")
"""Statistics of a BatchNorm. A GroupNorm in its place uses only its gains and biases."""
_MAX_LISTED = 4
"""Maximum number of names of each kind in an error message."""


def is_model(weights: str) -> bool:
    """Return whether `model.backbone.weights` names a whole segmentation model, not a backbone alone.

    Raises ConfigError if the weights cannot be found or read.
    """
    path = _path(weights)
    try:
        return detect_layout(read_names(path)) != "backbone"
    except WeightsError as error:
        raise ConfigError(f"model.backbone.weights: {error}") from error


def load_from_model(backbone: nn.Module, weights: str) -> None:
    """Load the backbone of a whole model, in any layout that `load_weights` supports.

    A vision transformer may move between a backbone that returns its tokens, a ViT-Adapter and a feature pyramid. The
    layers of adapter and pyramid keep their initialisation then. Learned positions are interpolated to another grid.

    Raises ConfigError with the names of missing, unexpected and differing tensors if the model has another backbone.
    """
    state = _backbone_of(_path(weights))
    target = {f"{_PREFIX}{name}": tensor for name, tensor in backbone.state_dict().items() if not is_ignored(name)}
    if (inner := _inner(target)) != (stored := _inner(state)):
        target = {name: tensor for name, tensor in target.items() if name.startswith(inner)}
        state = {name: tensor for name, tensor in state.items() if name.startswith(stored)}
    state = match_backbone_names(target, state)
    state = {name: _resampled(name, tensor, target) for name, tensor in state.items()}
    problems = {
        "missing": [name for name in target if name not in state],
        "unexpected": [name for name in state if name not in target and not _STATISTICS.search(name)],
        "of another shape": [
            f"{name} (file {tuple(tensor.shape)}, model {tuple(target[name].shape)})"
            for name, tensor in state.items()
            if name in target and tensor.shape != target[name].shape
        ],
    }
    if any(problems.values()):
        raise ConfigError(_message(weights, problems))
    loaded = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name in target}
    backbone.load_state_dict(loaded, strict=False)


def _path(weights: str) -> Path:
    """Return the path of the weights. Raises ConfigError if the hub does not provide them."""
    try:
        return weights_path(weights)
    except WeightsError as error:
        raise ConfigError(str(error)) from error


def _backbone_of(path: Path) -> dict[str, Tensor]:
    """Return the backbone of a model under our names. Raises ConfigError if the file is unreadable or has none."""
    try:
        state = read_state(path)
        own_state = to_own_names(state, detect_layout(state))
    except WeightsError as error:
        raise ConfigError(f"model.backbone.weights: {error}") from error
    found = {name: tensor for name, tensor in own_state.items() if name.startswith(_PREFIX) and not is_ignored(name)}
    if not found:
        raise ConfigError(
            f"model.backbone.weights: {path} contains a model without a backbone; set model.weights to it, and "
            "model.backbone.weights to a file with the backbone"
        )
    return found


def _inner(names: Iterable[str]) -> str:
    """Return the prefix of the vision transformer in a backbone with additional layers, or that of all names."""
    names = tuple(names)
    prefixes = [f"{_PREFIX}{inner}" for inner in _INNER]
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), _PREFIX)


def _resampled(name: str, tensor: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """Return learned positions [1, P + N, C] for the model's grid; other tensors stay unchanged.

    Both grids must be square, otherwise positions stay unchanged too. P is 0, or 1 if the class token has a position.
    """
    if not name.endswith("pos_embed") or name not in target or tensor.shape == target[name].shape:
        return tensor
    for prefix in (0, 1):
        sides = [math.isqrt(max(0, positions.shape[1] - prefix)) for positions in (tensor, target[name])]
        if [side**2 + prefix for side in sides] == [tensor.shape[1], target[name].shape[1]]:
            old, new = ([side, side] for side in sides)
            return resample_abs_pos_embed(tensor, new, old, num_prefix_tokens=prefix)
    return tensor


def _message(weights: str, problems: Mapping[str, list[str]]) -> str:
    lines = []
    for kind, names in problems.items():
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        lines += [f"{len(names)} {kind}: {', '.join(names[:_MAX_LISTED])}{more}"] if names else []
    return (
        f"model.backbone.weights is {weights}, a model with another backbone than the recipe's ({'; '.join(lines)}); "
        "set model.backbone (kind, name, norm, options) to that of the file, or choose other weights"
    )
