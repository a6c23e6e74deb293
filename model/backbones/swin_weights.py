"""Initialise a Swin Transformer from published weights in any of the common naming schemes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import timm
from torch import Tensor

from m2f.model.backbones.swin import SwinTransformer
from m2f.model.config import SwinBackboneConfig
from m2f.model.errors import ConfigError, WeightsError
from m2f.model.weights.files import read_state
from m2f.model.weights.packages import weights_path

_CLASSIFIER_NAMES = re.compile(r"^(norm|head|fc)\.")
_BUFFER_NAMES = re.compile(r"\.(relative_position_index|attn_mask)$")
"""Tensors of published files that are not weights of the backbone: classifiers, and tables that it computes itself."""
_OUTPUT_NORM_NAMES = re.compile(r"^norm\d\.")
"""LayerNorms of the outputs, which classifiers do not have."""


def load_swin_weights(backbone: SwinTransformer, config: SwinBackboneConfig) -> None:
    """Load the weights that `config.pretrained` or `config.weights` names. With neither, keep the initialisation.

    Raises ConfigError if the weights are not available or belong to another Swin.
    """
    if config.weights is not None:
        setting, source = "weights", config.weights
        try:
            state: Mapping[str, Tensor] = read_state(weights_path(config.weights))
        except WeightsError as error:
            raise ConfigError(f"model.backbone.weights: {error}") from error
    elif config.pretrained is not None:
        setting, source = "pretrained", config.pretrained
        state = _fetch(config.pretrained)
    else:
        return
    weights = official_swin_names(state)
    own_state = backbone.state_dict()
    problems = [f"{key} is missing" for key in own_state if key not in weights and not _OUTPUT_NORM_NAMES.match(key)]
    problems += [f"{key} is unknown" for key in weights if key not in own_state]
    problems += [
        f"{key} has shape {tuple(tensor.shape)}, expected {tuple(own_state[key].shape)}"
        for key, tensor in weights.items()
        if key in own_state and tensor.shape != own_state[key].shape
    ]
    if problems:
        raise ConfigError(
            f"model.backbone.{setting} is {source!r}, which does not fit a Swin with embed_dim {config.embed_dim}, "
            f"depths {config.depths} and window_size {config.window_size} ({len(problems)} differences): "
            + "; ".join(problems[:3])
        )
    backbone.load_state_dict(weights, strict=False)


def official_swin_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's weights from a state dict of timm or of the Swin authors.

    The two differ only in the merging between two stages, which timm assigns to the later stage. The norms of the
    outputs, `norm0` to `norm3`, exist in segmentation models only.
    """
    weights = {
        key: tensor
        for key, tensor in state.items()
        if not _BUFFER_NAMES.search(key) and not _CLASSIFIER_NAMES.match(key)
    }
    if "layers.0.downsample.reduction.weight" in weights:
        return weights
    return {
        re.sub(r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample.", key): tensor
        for key, tensor in weights.items()
    }


def _fetch(name: str) -> dict[str, Tensor]:
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:
        raise ConfigError(
            f"model.backbone.pretrained is {name!r}, whose weights timm cannot fetch: {error}. "
            "Without a network, set model.backbone.weights to a file"
        ) from error
