"""Build a model with the weights of a file. If the file lacks the backbone, load the recipe's backbone weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from m2f.model.config import ModelConfig, ViTAdapterBackboneConfig
from m2f.model.errors import WeightsError
from m2f.model.mask2former import build_model
from m2f.model.segmenter import Segmenter
from m2f.model.weights.files import read_state
from m2f.model.weights.load import LoadReport, load_weights
from m2f.model.weights.names import detect_layout, is_head_alone


def build_with_weights(
    config: ModelConfig, source: str | Path, class_rows: Sequence[int | None] | None = None, *, deltas: bool = False
) -> tuple[Segmenter, LoadReport]:
    """Return the model of a recipe with the weights of a file or folder, and the load report.

    Published heads on frozen vision transformers do not include the transformer. For such a file, the backbone gets the
    weights that the recipe names. See `load_weights` for `class_rows` and `deltas`. Files of this project are never
    deltas.

    Raises:
        WeightsError: as `load_weights`, and if the file has no backbone and the recipe names no weights for it.
    """
    state, backbone = read_state(source), config.backbone
    head_alone = is_head_alone(state)
    if head_alone and backbone.weights is None and backbone.published_name is None:
        raise WeightsError(
            f"{source} contains a head without a backbone, and the recipe names no backbone weights; set "
            "model.backbone.pretrained to true, or model.backbone.weights to a file"
        )
    deltas = deltas and detect_layout(state) != "own"
    model = build_model(config, pretrained_backbone=head_alone or deltas)
    report = load_weights(model, state, class_rows, deltas=deltas, name=str(source))
    if head_alone:
        own = "backbone.vit." if isinstance(backbone, ViTAdapterBackboneConfig) else "backbone."
        missing = tuple(name for name in report.missing if not name.startswith(own))
        report = replace(report, missing=missing, head_alone=True)
    return model, report
