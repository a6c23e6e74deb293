"""Whether a backbone's published weights can be had, found out before anything starts."""

from __future__ import annotations

import timm

from m2f.model.analysis.flops.executed import build_backbone_shapes
from m2f.model.backbones.batch_norms import FrozenBatchNorm2d
from m2f.model.config import BackboneConfig
from m2f.model.errors import ConfigError
from m2f.model.weights.hub import unavailable


def published_problem(name: str) -> str | None:
    """Why timm's published weights of a model cannot be had here; None where they can. Answers within 5 s.

    Raises ConfigError where the name has a tag that timm does not know.
    """
    if not timm.is_model(name):
        return None  # the model's construction names those that timm has
    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # of a tag after the dot
        known = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*")) or "none"
        raise ConfigError(f"model.backbone.name is {name!r}: {error}; published are: {known}") from error
    if found is None or not (found.hf_hub_id or found.url):
        return f"timm has no published weights of {name}"
    return None if found.hf_hub_id is None else unavailable(found.hf_hub_id)


def has_frozen_norms(config: BackboneConfig) -> bool:
    """Whether a backbone has norms that training leaves as they are."""
    return any(isinstance(module, FrozenBatchNorm2d) for module in build_backbone_shapes(config).modules())
