"""Check that a weights file belongs to a backbone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from m2f.model.config import TimmBackboneConfig
from m2f.model.errors import ConfigError

_MIN_MATCHING_SHARE = 0.5
"""Minimum share of a model's matrices and kernels that must come from the file; timm may resample stems and
positions."""


def require_weights_of(model: nn.Module, state: Mapping[str, Tensor], config: TimmBackboneConfig) -> None:
    """Raise ConfigError unless `state` contains at least half of the matrices and kernels of `model`.

    timm silently skips files of other models. It also renames, splits and resamples tensors, so the check compares
    values instead of names.
    """
    in_file = {_fingerprint(tensor) for tensor in state.values()}
    is_found = [_fingerprint(parameter) in in_file for parameter in model.parameters() if parameter.ndim > 1]
    if sum(is_found) < _MIN_MATCHING_SHARE * len(is_found):
        raise ConfigError(
            f"model.backbone.weights is {config.weights!r}, which contains only {sum(is_found)} of the {len(is_found)} "
            f"matrices and kernels of {config.name!r}; the file belongs to another model"
        )


def _fingerprint(tensor: Tensor) -> tuple[int, float]:
    return tensor.numel(), tensor.detach().double().sum().item()
