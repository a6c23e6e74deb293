"""Convert weight names between the supported layouts, in both directions.

Mask2Former's layouts (official, Hugging Face, DINOv3) are converted through *canonical* names: every tensor under its
official name, with separate query, key and value projections. Other layouts have their own modules. Layouts differ in
names, which templates translate, and in how they pack projections. The official code packs the three projections of one
attention into a matrix. Our model has one matrix for the keys of all layers that attend to one level, and one for their
values. It has one matrix for query and key of a self-attention.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from torch import Tensor

from m2f.model.backbones.swin_weights import official_swin_names
from m2f.model.errors import WeightsError
from m2f.model.weights.dinov3 import backbone_to_dinov3, dinov3_to_canonical, head_to_dinov3, is_dinov3, lacks_vit
from m2f.model.weights.eomt import eomt_to_own, is_eomt
from m2f.model.weights.maskformer import is_maskformer, maskformer_to_own
from m2f.model.weights.packing import PackedNames, attention_packs, pack, unpack
from m2f.model.weights.pmt import is_pmt, pmt_to_own
from m2f.model.weights.tables import CANONICAL_TO_OWN, HUGGING_FACE_TO_CANONICAL, NameTable
from m2f.model.weights.transformers_vit import is_transformers_vit, transformers_vit_to_timm

Layout = Literal["own", "official", "hugging_face", "eomt", "pmt", "dinov3", "backbone"]
"""Naming scheme of a state dict; `backbone` means published weights of a backbone alone."""

_IGNORED = re.compile(r"num_batches_tracked$|relative_position_index$|^criterion\.|^(backbone\.(body\.|stem\.)?)?fc\.")
"""Tensors in files that are not weights of our model: counters, tables derived from settings, and classifiers."""


_OLD_OFFICIAL = (
    # Before version 2, heads have no `pixel_decoder` level in their names and call the query features `static_query`.
    (re.compile(r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)"), "sem_seg_head.pixel_decoder."),
    (re.compile(r"\.predictor\.static_query\."), ".predictor.query_feat."),
)

_NEW_HUGGING_FACE = (
    # Since transformers 5, a Swin in memory has other names than its files. The files keep the names of the table.
    (re.compile(r"\.encoder\.swin\."), ".encoder."),
    (re.compile(r"(\.blocks\.\d+\.attention)\.q_proj\."), r"\1.self.query."),
    (re.compile(r"(\.blocks\.\d+\.attention)\.k_proj\."), r"\1.self.key."),
    (re.compile(r"(\.blocks\.\d+\.attention)\.v_proj\."), r"\1.self.value."),
    (re.compile(r"(\.blocks\.\d+\.attention)\.o_proj\."), r"\1.output.dense."),
    (re.compile(r"(\.blocks\.\d+\.attention)\.relative_position_bias\."), r"\1.self."),
    (re.compile(r"(\.blocks\.\d+)\.mlp\.fc1\."), r"\1.intermediate.dense."),
    (re.compile(r"(\.blocks\.\d+)\.mlp\.fc2\."), r"\1.output.dense."),
    # Unused: a norm after the last stage; the features pass through other norms.
    (re.compile(r"^model\.pixel_level_module\.encoder\.layernorm\."), "criterion.layernorm."),
)


def detect_layout(names: Collection[str]) -> Layout:
    """Return the naming scheme of a state dict, given its names."""
    if any(name.startswith("sem_seg_head.") for name in names):
        return "official"
    if is_eomt(names):
        return "eomt"
    if is_pmt(names):
        return "pmt"
    if is_dinov3(names):
        return "dinov3"
    if any(name.startswith("model.pixel_level_module.") for name in names):
        return "hugging_face"
    if any(name.startswith(("backbone.", "pixel_decoder.", "transformer_decoder.")) for name in names):
        return "own"
    return "backbone"


def is_head_alone(state: Mapping[str, Tensor]) -> bool:
    """Return whether a file is a head that its authors publish without the backbone."""
    match detect_layout(state):
        case "dinov3":
            return lacks_vit(state)
        case "pmt":
            return not any(name.startswith("network.encoder.") for name in state)
        case _:
            return False


def to_own_names(state: Mapping[str, Tensor], layout: Layout, levels: int = 3) -> dict[str, Tensor]:
    """Return the weights under our names, with projections packed as in our model. Names without a rule stay unchanged.

    `levels` is the number of feature levels that the transformer decoder attends to in turn.
    """
    match layout:
        case "own":
            return dict(state)
        case "official":
            current = {_substitute(name, _OLD_OFFICIAL): tensor for name, tensor in state.items()}
            if not is_maskformer(current):
                return _canonical_to_own(current, levels)
            return maskformer_to_own({name: tensor for name, tensor in current.items() if not is_ignored(name)})
        case "hugging_face":
            files = {_substitute(name, _NEW_HUGGING_FACE): tensor for name, tensor in state.items()}
            return _canonical_to_own(
                {HUGGING_FACE_TO_CANONICAL.forward(name) or name: t for name, t in files.items()}, levels
            )
        case "eomt":
            return eomt_to_own({name: tensor for name, tensor in state.items() if not is_ignored(name)})
        case "pmt":
            return pmt_to_own(state)
        case "dinov3":
            return _canonical_to_own(dinov3_to_canonical(state), levels)
        case "backbone":
            return _backbone_to_own(state)


def to_official_names(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights under the official names. Raises WeightsError if the official code has no such model."""
    canonical = _own_to_canonical(own)
    return pack(canonical, attention_packs(canonical))


def to_hugging_face_names(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights under the names of Hugging Face's files.

    Raises WeightsError if Hugging Face has no such model.
    """
    canonical = _own_to_canonical(own)
    cross = {name: parts for name, parts in attention_packs(canonical).items() if "cross_attention" in name}
    return _renamed(pack(canonical, cross), HUGGING_FACE_TO_CANONICAL, "Hugging Face")


def to_dinov3_names(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights under the names of DINOv3's segmentation head, vision transformer included.

    Raises WeightsError if DINOv3 has no such model.
    """
    backbone = {name: tensor for name, tensor in own.items() if name.startswith("backbone.")}
    head = _own_to_canonical({name: tensor for name, tensor in own.items() if name not in backbone})
    return backbone_to_dinov3(backbone) | head_to_dinov3(pack(head, attention_packs(head)))


def count_levels(own: Iterable[str]) -> int:
    """Return the number of feature levels that our transformer decoder attends to in turn.

    Return 3 if the names do not show it.
    """
    levels = {match[1] for name in own if (match := re.match(r"transformer_decoder\.memories\.(\d+)\.", name))}
    return len(levels) or 3


def is_ignored(name: str) -> bool:
    """Return whether a name belongs to a tensor that is not a weight of our model."""
    return _IGNORED.search(name) is not None


def _canonical_to_own(state: Mapping[str, Tensor], levels: int = 3) -> dict[str, Tensor]:
    weights = {name: tensor for name, tensor in state.items() if not is_ignored(name)}
    canonical = unpack(weights, attention_packs(weights))
    own = {CANONICAL_TO_OWN.forward(name) or name: tensor for name, tensor in canonical.items()}
    return pack(own, _own_packs(own, levels))


def _own_to_canonical(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: tensor for name, tensor in own.items() if not is_ignored(name)}
    parts = unpack(kept, _own_packs(kept, count_levels(kept)))
    canonical: dict[str, Tensor] = {}
    unknown = [name for name in parts if CANONICAL_TO_OWN.inverse(name) is None]
    if unknown:
        raise WeightsError(_no_counterpart("the official code", unknown))
    for name, tensor in parts.items():
        canonical[CANONICAL_TO_OWN.inverse(name) or name] = tensor
    return canonical


def _own_packs(names: Iterable[str], levels: int) -> PackedNames:
    """Return how our model packs projections.

    Cross-attention is packed per level over its layers, self-attention per layer, and Swin as in the official layout.
    """
    names = tuple(names)
    layers = {int(match[1]) for name in names if (match := re.match(r"transformer_decoder\.layers\.(\d+)\.", name))}
    packs = dict(attention_packs(name for name in names if name.startswith("backbone.")))
    for kind in ("weight", "bias"):
        for level in range(levels):
            of_level = sorted(layer for layer in layers if layer % levels == level)
            for role in ("key", "value"):
                packs[f"transformer_decoder.memories.{level}.{role}.{kind}"] = tuple(
                    f"transformer_decoder.layers.{layer}.cross_{role}.{kind}" for layer in of_level
                )
        for layer in layers:
            own = f"transformer_decoder.layers.{layer}"
            packs[f"{own}.self_query_key.{kind}"] = (f"{own}.self_query.{kind}", f"{own}.self_key.{kind}")
    return packs


def _renamed(canonical: Mapping[str, Tensor], table: NameTable, target: str) -> dict[str, Tensor]:
    names = {name: table.inverse(name) for name in canonical}
    unknown = [name for name, new in names.items() if new is None]
    if unknown:
        raise WeightsError(_no_counterpart(target, unknown))
    return {new: canonical[name] for name, new in names.items() if new is not None}


def _no_counterpart(target: str, names: list[str]) -> str:
    return (
        f"{len(names)} weights have no counterpart in {target}, for example {names[0]}; "
        "a ResNet or Swin backbone with the default pixel decoder and transformer decoder can be exported"
    )


def to_timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a backbone alone, with those of Detectron2 and transformers under timm's names.

    These are ResNets, DINOv2 and DINOv3. Others stay unchanged; timm reads the names of their authors.
    """
    if is_transformers_vit(state):
        return transformers_vit_to_timm(state)
    if not _is_detectron_resnet(state):
        return dict(state)
    return {name.removeprefix("backbone.body."): tensor for name, tensor in _backbone_to_own(state).items()}


def _backbone_to_own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a backbone's published weights under our names.

    Supported are Detectron2's ResNets, DINOv2 and DINOv3 of transformers, Swin of Microsoft and of timm, and timm's
    other models.
    """
    if is_transformers_vit(state):
        state = transformers_vit_to_timm(state)
    if _is_detectron_resnet(state):
        return _canonical_to_own({f"backbone.{name}": tensor for name, tensor in state.items()})
    if "patch_embed.proj.weight" in state and "layers.0.blocks.0.attn.qkv.weight" in state:
        return {f"backbone.{name}": tensor for name, tensor in official_swin_names(state).items()}
    return {f"backbone.body.{name}": tensor for name, tensor in state.items() if not re.match(r"(fc|head)\.", name)}


def _is_detectron_resnet(state: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of a Detectron2 ResNet.

    Raises WeightsError for the older Caffe2 ResNets, whose arithmetic differs.
    """
    if "res2_0_branch2a_w" in state:
        raise WeightsError(
            "these are ResNet weights of Caffe2 (MSRA), which strides in the first convolution of a block and takes "
            "BGR images; the features would be wrong. Use the torchvision weights, for example torchvision's R-50.pkl"
        )
    return "stem.conv1.weight" in state


def _substitute(name: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name
