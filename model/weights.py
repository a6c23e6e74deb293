"""Save and load weights: our own files, Hugging Face Mask2Former and the official Detectron2 layout.

Foreign layouts are brought to the official names by renaming, then to ours. Attention is where the layouts differ in
more than names: the official code packs the query, key and value projections of a layer into one matrix, while ours
keeps the keys (and values) of all layers that attend to one level in one matrix. See `_place`.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from model.errors import UserError
from model.transformer_decoder import NUM_LEVELS

Layout = Literal["own", "official", "hugging_face"]

_Rules = tuple[tuple[str, str], ...]

_OFFICIAL_TO_OWN: _Rules = (
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.body.bn1."),
    (r"^backbone\.stem\.conv1\.", "backbone.body.conv1."),
    (r"^backbone\.res2\.", "backbone.body.layer1."),
    (r"^backbone\.res3\.", "backbone.body.layer2."),
    (r"^backbone\.res4\.", "backbone.body.layer3."),
    (r"^backbone\.res5\.", "backbone.body.layer4."),
    (r"^(backbone\.body\..*)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"^(backbone\.body\..*)\.shortcut\.", r"\1.downsample.0."),
    (r"^(backbone\.body\..*)\.conv(\d)\.norm\.", r"\1.bn\2."),
    # Files from before version 2 lack the level `pixel_decoder` and call the query features `static_query`.
    (r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)", "sem_seg_head.pixel_decoder."),
    (r"^sem_seg_head\.pixel_decoder\.", "pixel_decoder."),
    (r"^sem_seg_head\.predictor\.", "transformer_decoder."),
    (r"^pixel_decoder\.transformer\.level_embed$", "pixel_decoder.level_embed"),
    (r"^pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.self_attn\.", r"pixel_decoder.layers.\1.attention."),
    (r"^pixel_decoder\.transformer\.encoder\.", "pixel_decoder."),
    (r"^pixel_decoder\.adapter_1\.norm\.", "pixel_decoder.lateral.1."),
    (r"^pixel_decoder\.adapter_1\.", "pixel_decoder.lateral.0."),
    (r"^pixel_decoder\.layer_1\.norm\.", "pixel_decoder.output.1."),
    (r"^pixel_decoder\.layer_1\.", "pixel_decoder.output.0."),
    (r"^transformer_decoder\.static_query\.", "transformer_decoder.query_feat."),
    (r"^transformer_decoder\.decoder_norm\.", "transformer_decoder.norm."),
    (r"^transformer_decoder\.input_proj\.(\d)\.", r"transformer_decoder.memories.\1.input_proj."),
    (r"^transformer_decoder\.mask_embed\.layers\.0\.", "transformer_decoder.mask_embed.0."),
    (r"^transformer_decoder\.mask_embed\.layers\.1\.", "transformer_decoder.mask_embed.2."),
    (r"^transformer_decoder\.mask_embed\.layers\.2\.", "transformer_decoder.mask_embed.4."),
    (r"\.transformer_ffn_layers\.", ".layers."),
    (r"\.transformer_cross_attention_layers\.(\d+)\.multihead_attn\.out_proj\.", r".layers.\1.cross.output."),
    (r"\.transformer_cross_attention_layers\.(\d+)\.norm\.", r".layers.\1.cross.norm."),
    (r"\.transformer_self_attention_layers\.(\d+)\.self_attn\.out_proj\.", r".layers.\1.self_attention.output."),
    (r"\.transformer_self_attention_layers\.(\d+)\.norm\.", r".layers.\1.self_attention.norm."),
)

_HUGGING_FACE_TO_OFFICIAL: _Rules = (
    (r"^model\.pixel_level_module\.encoder\.", "backbone."),
    (r"^backbone\.embedder\.embedder\.", "backbone.stem.conv1."),
    (r"^backbone\.encoder\.stages\.0\.layers\.", "backbone.res2."),
    (r"^backbone\.encoder\.stages\.1\.layers\.", "backbone.res3."),
    (r"^backbone\.encoder\.stages\.2\.layers\.", "backbone.res4."),
    (r"^backbone\.encoder\.stages\.3\.layers\.", "backbone.res5."),
    (r"^(backbone\..*)\.layer\.0\.", r"\1.conv1."),
    (r"^(backbone\..*)\.layer\.1\.", r"\1.conv2."),
    (r"^(backbone\..*)\.layer\.2\.", r"\1.conv3."),
    (r"^(backbone\..*)\.convolution\.", r"\1."),
    (r"^(backbone\..*)\.normalization\.", r"\1.norm."),
    (r"^model\.pixel_level_module\.decoder\.", "sem_seg_head.pixel_decoder."),
    (r"\.pixel_decoder\.input_projections\.", ".pixel_decoder.input_proj."),
    (r"\.pixel_decoder\.level_embed$", ".pixel_decoder.transformer.level_embed"),
    (r"\.pixel_decoder\.encoder\.", ".pixel_decoder.transformer.encoder."),
    (r"(\.transformer\.encoder\..*)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"(\.transformer\.encoder\..*)\.final_layer_norm\.", r"\1.norm2."),
    (r"\.pixel_decoder\.mask_projection\.", ".pixel_decoder.mask_features."),
    (r"\.pixel_decoder\.(adapter_1|layer_1)\.0\.", r".pixel_decoder.\1."),
    (r"\.pixel_decoder\.(adapter_1|layer_1)\.1\.", r".pixel_decoder.\1.norm."),
    (r"^model\.transformer_module\.decoder\.", "model.transformer_module."),
    (r"^model\.transformer_module\.", "sem_seg_head.predictor."),
    (r"^class_predictor\.", "sem_seg_head.predictor.class_embed."),
    (r"\.predictor\.queries_features\.", ".predictor.query_feat."),
    (r"\.predictor\.queries_embedder\.", ".predictor.query_embed."),
    (r"\.predictor\.layernorm\.", ".predictor.decoder_norm."),
    (r"\.predictor\.input_projections\.", ".predictor.input_proj."),
    (r"\.predictor\.mask_predictor\.mask_embedder\.(\d)\.0\.", r".predictor.mask_embed.layers.\1."),
    (r"\.layers\.(\d+)\.self_attn_layer_norm\.", r".transformer_self_attention_layers.\1.norm."),
    (r"\.layers\.(\d+)\.cross_attn_layer_norm\.", r".transformer_cross_attention_layers.\1.norm."),
    (r"\.layers\.(\d+)\.cross_attn\.", r".transformer_cross_attention_layers.\1.multihead_attn."),
    (r"\.predictor\.layers\.(\d+)\.self_attn\.", r".predictor.transformer_self_attention_layers.\1.self_attn."),
    (r"\.predictor\.layers\.(\d+)\.final_layer_norm\.", r".predictor.transformer_ffn_layers.\1.norm."),
    (r"\.predictor\.layers\.(\d+)\.fc", r".predictor.transformer_ffn_layers.\1.fc"),
    (r"\.fc([12])\.", r".linear\1."),
)

_NOT_WEIGHTS = re.compile(r"num_batches_tracked$|^criterion\.|relative_position_index$|^backbone\.(body\.)?fc\.")
_MAY_DIFFER = re.compile(r"^transformer_decoder\.(class_embed|query_feat|query_embed)\.")
"""Their first axis is the number of classes or queries, which another task may choose differently."""


class WeightsError(UserError):
    """A file of weights that cannot be read or does not belong to this model."""


@dataclass(frozen=True)
class LoadReport:
    """What happened to every tensor of a file and of the model. Names are ours."""

    layout: Layout
    loaded: tuple[str, ...]
    renamed: int
    """Tensors of the file that had another name."""
    skipped: tuple[str, ...]
    """Left at their initialisation because the number of classes or queries differs, with both shapes."""
    missing: tuple[str, ...]
    """Left at their initialisation because the file does not have them."""
    unexpected: tuple[str, ...]
    """In the file but not in the model."""

    @property
    def complete(self) -> bool:
        """Whether every weight of the model came from the file."""
        return not self.skipped and not self.missing

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} weights loaded from a file with {self.layout} names ({self.renamed} renamed)"]
        for title, names in (("skipped", self.skipped), ("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                lines.append(f"{len(names)} {title}: {', '.join(names[:8])}{more}")
        return "\n".join(lines)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write all parameters and persistent buffers as safetensors. A reader never sees half a file."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        safetensors.torch.save_file(state, partial, metadata={"format": "pt"})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> LoadReport:
    """Load a file (safetensors, or a torch file read without executing pickles) or a state dict into `model`.

    The names may be ours, Hugging Face's or the official ones. Class head and queries of another size are skipped and
    reported. Raises WeightsError for an unreadable file, for weights of another architecture, and if nothing matches.
    """
    state = source if isinstance(source, Mapping) else read_state(source)
    name = "the given state dict" if isinstance(source, Mapping) else str(source)
    layout = detect_layout(state)
    converted = to_own_names(state, layout)
    target = model.state_dict()
    found = [key for key in converted if key in target]
    different = [key for key in found if converted[key].shape != target[key].shape]
    wrong = [key for key in different if not _MAY_DIFFER.match(key)]
    if wrong:
        listed = "; ".join(_both_shapes(key, converted, target) for key in wrong[:4])
        raise WeightsError(f"{name} belongs to another architecture ({len(wrong)} shapes differ): {listed}")
    loaded = tuple(key for key in found if key not in different)
    if not loaded:
        raise WeightsError(f"{name} has no weight of this model; its first names are {', '.join(list(state)[:3])}")
    model.load_state_dict({key: converted[key] for key in loaded}, strict=False)
    return LoadReport(
        layout=layout,
        loaded=loaded,
        renamed=sum(key not in target for key in state if not _NOT_WEIGHTS.search(key)) if layout != "own" else 0,
        skipped=tuple(_both_shapes(key, converted, target) for key in different),
        missing=tuple(key for key in target if key not in converted),
        unexpected=tuple(key for key in converted if key not in target),
    )


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch file; a wrapper such as {"model": ...} is opened. Raises WeightsError."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"weights {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"weights {path} cannot be read as plain tensors ({error}); only safetensors and torch files without "
            "other Python objects are accepted"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise WeightsError(f"weights {path} holds a {type(state).__name__}, not a dictionary of tensors")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def detect_layout(state: Mapping[str, Tensor]) -> Layout:
    """Whose names a state dict uses."""
    if any(key.startswith("sem_seg_head.") for key in state):
        return "official"
    if any(key.startswith("model.pixel_level_module.") for key in state):
        return "hugging_face"
    return "own"


def to_own_names(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The same weights under our names, attention projections regrouped, without what is not a weight."""
    weights = {key: tensor for key, tensor in state.items() if not _NOT_WEIGHTS.search(key)}
    if layout == "own":
        return weights
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, tensor in weights.items():
        official = _rename(key, _HUGGING_FACE_TO_OFFICIAL) if layout == "hugging_face" else key
        for name, slot, part in _place(official, tensor):
            parts[name][slot] = part
    return {
        name: slots[0] if len(slots) == 1 and 0 in slots else torch.cat([slots[slot] for slot in sorted(slots)])
        for name, slots in parts.items()
    }


_ATTENTION = re.compile(
    r"^sem_seg_head\.predictor\.transformer_(cross|self)_attention_layers\.(\d+)\.(?:multihead_attn|self_attn)\."
    r"(in_proj_|q_proj\.|k_proj\.|v_proj\.)(weight|bias)$"
)


def _place(key: str, tensor: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """Where an official tensor goes: our name, its rank among the parts joined along the first axis, and the part."""
    match = _ATTENTION.match(key)
    if match is None:
        yield _rename(key, _OFFICIAL_TO_OWN), 0, tensor
        return
    kind, layer, projection, suffix = match[1], int(match[2]), match[3], match[4]
    slot, level = divmod(layer, NUM_LEVELS)
    own = f"transformer_decoder.layers.{layer}"
    memory = f"transformer_decoder.memories.{level}"
    places = {
        "cross": ((f"{own}.cross_query", 0), (f"{memory}.key", slot), (f"{memory}.value", slot)),
        "self": ((f"{own}.self_query_key", 0), (f"{own}.self_query_key", 1), (f"{own}.self_value", 0)),
    }[kind]
    if projection == "in_proj_":
        for (name, rank), part in zip(places, tensor.chunk(3), strict=True):
            yield f"{name}.{suffix}", rank, part
    else:
        name, rank = places["qkv".index(projection[0])]
        yield f"{name}.{suffix}", rank, tensor


def _rename(key: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _both_shapes(key: str, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str:
    return f"{key} (file {tuple(source[key].shape)}, model {tuple(target[key].shape)})"
