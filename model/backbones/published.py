"""Availability of a backbone's published weights, checked before a run starts."""

from __future__ import annotations

import timm

from m2f.model.analysis.flops.executed import build_backbone_shapes
from m2f.model.backbones.batch_norms import FrozenBatchNorm2d
from m2f.model.backbones.timm_names import name_problem
from m2f.model.config import BackboneConfig
from m2f.model.errors import ConfigError
from m2f.model.weights.hub import unavailable_reason


def published_problem(name: str) -> str | None:
    """Return why timm's published weights of a model are not available, or None if they are. Takes at most 5 s.

    Raises ConfigError if the name has a tag that timm does not have.
    """
    if not timm.is_model(name):
        return None  # building the model reports the error and suggests names
    if (problem := name_problem(name)) is not None:
        raise ConfigError(f"the backbone is {name!r}, {problem}")
    found = timm.get_pretrained_cfg(name)
    if found is None or not (found.hf_hub_id or found.url):
        return f"timm has no published weights for {name}"
    return None if found.hf_hub_id is None else unavailable_reason(found.hf_hub_id)


def has_frozen_norms(config: BackboneConfig) -> bool:
    """Return whether a backbone has norms that training does not change."""
    return any(isinstance(module, FrozenBatchNorm2d) for module in build_backbone_shapes(config).modules())
