"""Load weights in any supported layout into a model, with a report on every tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f.model.errors import WeightsError
from m2f.model.weights.files import read_state
from m2f.model.weights.maskformer import is_maskformer, require_maskformer
from m2f.model.weights.names import Layout, count_levels, detect_layout, is_ignored, to_own_names

_TASK_SIZED = re.compile(r"^transformer_decoder\.(class_embed|query_feat|query_embed)\.")
"""Weights whose first axis is the number of classes or queries, which may differ between tasks."""

_CLASS_HEAD = re.compile(r"^transformer_decoder\.class_embed\.")
_PROJECTION = re.compile(r"^transformer_decoder\.memor(y|ies\.\d+)\.input_proj\.")
"""Projections before the transformer decoder. Without them the decoder would read other features than in training."""
_MASK_PROBABILITIES = "transformer_decoder.attn_mask_probs"
_RELATIVE_POSITIONS = "relative_position_bias_table"
"""Name suffix of a table that depends on the window size."""
_PARTS = ("backbone.", "pixel_decoder.", "transformer_decoder.")
_NORM = re.compile(r"\.0(\.(weight|bias|running\.mean|running\.var|num\.batches\.tracked))$")
"""Place of a norm in a sequence, if a name has dots instead of underscores."""
_CONTAINER = re.compile(r"^backbone\.(body\.(model\.)?|vit\.)")
"""Prefix of a timm model inside our backbones."""
_TOKENS = (
    ("backbone.embed.proj.", "backbone.patch_embed.proj."),
    ("backbone.embed.norm.", "backbone.norm_pre."),
    ("backbone.embed.", "backbone."),
)
"""Names of the layers before the blocks of a vision transformer: of our `PatchTokens`, and of timm."""
_STATISTICS = re.compile(r"\.running_(mean|var)$")
"""Statistics of a BatchNorm. A GroupNorm in its place does not have them."""
_MAX_LISTED = 8
"""Maximum number of names of each kind in the report."""


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Result for every tensor of a file and of the model. Names are those of this project."""

    layout: Layout
    """Naming scheme of the file."""
    loaded: tuple[str, ...]
    """Weights of the model that were loaded from the file, including resized ones."""
    renamed: int
    """Number of tensors in the file that had another name."""
    resized: tuple[str, ...]
    """Position biases interpolated to another window size, with both shapes."""
    skipped: tuple[str, ...]
    """Weights that keep their initialisation because the number of classes or queries differs, with both shapes."""
    missing: tuple[str, ...]
    """Weights that keep their initialisation because the file does not have them. A backbone that a head-only file
    leaves out is not listed."""
    unexpected: tuple[str, ...]
    """Tensors of the file that the model does not have."""
    head_alone: bool = False
    """Whether the file leaves out the backbone (of a ViT-Adapter: its transformer), which then keeps the weights that
    `model.backbone` names."""
    class_rows: str | None = None
    """Number of class-head rows that came from the file, if its classes differ from the model's."""

    @property
    def complete(self) -> bool:
        """Return whether no weight is skipped or missing. With `head_alone`, the backbone does not count as missing."""
        return not self.skipped and not self.missing

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} weights loaded from a file with {self.layout} names ({self.renamed} renamed)"]
        for title in ("resized", "skipped", "missing", "unexpected"):
            names = getattr(self, title)
            if names:
                more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
                lines.append(f"{len(names)} {title}: {', '.join(names[:_MAX_LISTED])}{more}")
        if self.head_alone:
            lines.append("the file contains only a head; the backbone uses the weights from model.backbone")
        if self.class_rows is not None:
            lines.append(self.class_rows)
        return "\n".join(lines)


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    class_rows: Sequence[int | None] | None = None,
    *,
    deltas: bool = False,
    name: str = "the given state dict",
) -> LoadReport:
    """Load a file, a folder (see `m2f.model.weights.files`) or a state dict into a model.

    Names may be those of this project, of the official code, of Hugging Face, of EoMT's or PMT's authors, of DINOv3, or
    of published weights of a backbone alone. A class head and queries of another size are skipped and reported.

    Args:
        model: the model. It stays unchanged if an error is raised.
        source: file, folder or state dict.
        class_rows: for every class of the model, its label in the file, or None to keep its initialisation.
            The row of "no object" is always loaded.
        deltas: add the backbone of the file to the model's instead of replacing it.
        name: name of a state dict in error messages.

    Raises:
        WeightsError: the file is unreadable, the weights are of another architecture, or no name matches.
    """
    state = source if isinstance(source, Mapping) else read_state(source)
    name = name if isinstance(source, Mapping) else str(source)
    target = model.state_dict()
    layout = detect_layout(state)
    try:
        own = to_own_names(state, layout, count_levels(target))
    except WeightsError as error:
        raise WeightsError(f"{name}: {error}") from error
    converted = match_backbone_names(target, own)
    if layout in ("eomt", "pmt") and _MASK_PROBABILITIES in target:  # files of finished training runs may not have them
        converted.setdefault(_MASK_PROBABILITIES, torch.zeros_like(target[_MASK_PROBABILITIES]))
    if layout == "official" and is_maskformer(state):
        require_maskformer(converted, target, name)
    if class_rows is not None:
        _select_class_rows(converted, target, class_rows)
    resized = _resize_position_biases(converted, target)
    found = [key for key in converted if key in target]
    different = [key for key in found if converted[key].shape != target[key].shape]
    wrong = [key for key in different if not _TASK_SIZED.match(key)]
    if wrong:
        listed = "; ".join(_both_shapes(key, converted, target) for key in wrong[:4])
        raise WeightsError(f"{name} belongs to another architecture ({len(wrong)} shapes differ): {listed}")
    if projections := [key for key in converted if key not in target and _PROJECTION.match(key)]:
        raise WeightsError(
            f"{name} has 1x1 projections before its transformer decoder although the widths are equal "
            f"({projections[0]} and {len(projections) - 1} more; MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ in the official "
            "code); this program has them only where model.pixel_decoder.conv_dim differs from "
            "model.transformer_decoder.hidden_dim"
        )
    _require_depth(converted, target, layout, name)
    if deltas:
        own_backbone = [key for key in found if key.startswith("backbone.") and target[key].is_floating_point()]
        converted |= {key: target[key] + converted[key].to(target[key]) for key in own_backbone}
    loaded = tuple(key for key in found if key not in different)
    if not loaded:
        raise WeightsError(f"{name} has no weights of this model; its first names are {', '.join(list(state)[:3])}")
    model.load_state_dict({key: converted[key] for key in loaded}, strict=False)
    return LoadReport(
        layout=layout,
        loaded=loaded,
        renamed=sum(key not in target for key in state if not is_ignored(key)) if layout != "own" else 0,
        resized=resized,
        skipped=tuple(_both_shapes(key, converted, target) for key in different),
        missing=tuple(key for key in target if key not in converted and not is_ignored(key)),
        unexpected=tuple(key for key in converted if key not in target and not is_ignored(key)),
        class_rows=None if class_rows is None else _describe_rows(class_rows),
    )


def _select_class_rows(state: dict[str, Tensor], target: Mapping[str, Tensor], rows: Sequence[int | None]) -> None:
    """Replace the class head [K + 1, ...] of a file, in place, by rows in the order of the model's classes.

    A head of another width stays as it is; the comparison of shapes reports it.
    """
    heads = [key for key in state if _CLASS_HEAD.match(key) and key in target]
    for key in [key for key in heads if state[key].shape[1:] == target[key].shape[1:]]:
        selected = target[key].clone().to(state[key].dtype)
        for label, row in enumerate([*rows, len(state[key]) - 1]):
            if row is not None:
                selected[label] = state[key][row]
        state[key] = selected


def _describe_rows(rows: Sequence[int | None]) -> str:
    known = sum(row is not None for row in rows)
    return (
        f"class head: the rows of {known} known classes and of no object are kept, "
        f"{len(rows) - known} initialised randomly"
    )


def match_backbone_names(target: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map backbone names of timm's models to those of the model's backbone, which may differ in three ways.

    timm's feature models have names such as `stages_0` for `stages.0`. A replaced norm that timm fuses with an
    activation is `bn1.0` instead of `bn1` (see `replace_batch_norms`). The same vision transformer may provide tokens
    or maps, or be inside an adapter, each with other prefixes.
    """
    model_names = {plain_name(key): key for key in target if key.startswith("backbone.")}
    new_names = {key: key if key in target else model_names.get(plain_name(key), key) for key in state}
    return {key if (new := new_names[key]) in state else new: tensor for key, tensor in state.items()}


def plain_name(name: str) -> str:
    """Return the name of a backbone's weight in a form that is equal for all modules that contain the same layers."""
    name = _CONTAINER.sub("backbone.", name)
    for ours, timms in _TOKENS:
        name = name.replace(ours, timms)
    return _NORM.sub(r"\1", name.replace("_", "."))


def _require_depth(state: Mapping[str, Tensor], target: Mapping[str, Tensor], layout: Layout, name: str) -> None:
    """Raise WeightsError if a file has more blocks than the model, or less than half of its backbone.

    Files of a backbone alone may have more, for example a classifier. Heads alone have little of a backbone, or none.
    """
    more = [key for key in state if key not in target and key.startswith(_PARTS) and not _STATISTICS.search(key)]
    if layout != "backbone" and (more := [key for key in more if not is_ignored(key)]):
        raise WeightsError(
            f"{name} belongs to another model: the recipe's model lacks {len(more)} of its weights, for example "
            f"{', '.join(more[:3])}; set model.{more[0].partition('.')[0]} to that of the file"
        )
    backbone = [key for key in target if key.startswith("backbone.") and not is_ignored(key)]
    found = [key for key in backbone if key in state]
    if layout not in ("dinov3", "pmt") and 0 < 2 * len(found) < len(backbone):
        raise WeightsError(
            f"{name} has only {len(found)} of the {len(backbone)} weights of the recipe's backbone; set model.backbone "
            "to that of the file"
        )


def _resize_position_biases(state: dict[str, Tensor], target: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Interpolate Swin's relative position biases [(2 w - 1)^2, heads] in place to the model's window size w."""
    resized = []
    for key, tensor in state.items():
        target_shape = target[key].shape if key.endswith(_RELATIVE_POSITIONS) and key in target else tensor.shape
        if target_shape != tensor.shape and target_shape[1:] == tensor.shape[1:]:
            resized.append(_both_shapes(key, state, target))
            side, target_side = round(len(tensor) ** 0.5), round(target_shape[0] ** 0.5)
            grid = tensor.float().T.view(1, -1, side, side)
            grid = F.interpolate(grid, (target_side, target_side), mode="bicubic", align_corners=False)
            state[key] = grid.flatten(2)[0].T
    return tuple(resized)


def _both_shapes(key: str, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str:
    return f"{key} (file {tuple(source[key].shape)}, model {tuple(target[key].shape)})"
