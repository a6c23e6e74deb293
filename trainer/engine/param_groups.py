"""Parameter groups of the official optimizer, merged into a few groups that give the same updates."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from m2f.trainer.config import OptimizerConfig
from m2f.trainer.errors import TrainingError

_NORMS = (
    nn.modules.batchnorm._NormBase,  # every batch and instance norm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
_BLOCK = re.compile(r"(.*?(?:blocks|layer\d+)\.\d+)\.")
"""Name prefixes of residual blocks (layer1.0) and transformer blocks (blocks.0, or layers.0.blocks.0 in stages)."""
_POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed")


def build_param_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return groups `{name, params, lr, weight_decay}` for torch.optim.AdamW.

    Norms, `nn.Embedding` and the position tables of Swin have no weight decay, unless `decay_everything` is set. All
    other parameters decay, including biases. Parameters under the submodule `backbone` use
    `lr * backbone_lr_multiplier`, multiplied by `layer_decay` for every block between the parameter and the head.
    Raises TrainingError if nothing is trainable, or if `layer_decay` is not 1 and the trained part of the backbone has
    no blocks, or fewer than `layer_decay_spared`.
    """
    merged: dict[tuple[bool, int, bool], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    depths = _depths(model, config) if config.layer_decay != 1 else {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            depth = depths.get(parameter, 0)
            decays = config.decay_everything or _decays(module, name)
            merged.setdefault((_in_backbone(module_name), depth, decays), []).append(parameter)
    if not merged:
        raise TrainingError("the model has no trainable parameters; check model.freeze and model.backbone")
    return [
        {
            "name": f"{f'backbone_{depth}' if depth else 'backbone' if in_backbone else 'head'}"
            f"{'' if decays else '_no_decay'}",
            "params": merged[in_backbone, depth, decays],
            "lr": config.lr * (config.backbone_lr_multiplier if in_backbone else 1.0) * config.layer_decay**depth,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for in_backbone, depth, decays in sorted(merged, reverse=True)
    ]


def _in_backbone(module_name: str) -> bool:
    return "backbone" in module_name.split(".")


def _depths(model: nn.Module, config: OptimizerConfig) -> dict[nn.Parameter, int]:
    """Return, for every backbone parameter, the exponent of `layer_decay` in its learning rate.

    Parameters outside blocks (downsampling, norms) have the exponent of the block before them. Those before the first
    block have the largest exponent. Parameters outside a backbone's `first_part` count as after its last block.
    """
    named = [
        (name, p) for name, p in model.named_parameters() if p.requires_grad and _in_backbone(name.rpartition(".")[0])
    ]
    parts = [(name, getattr(module, "first_part", None)) for name, module in model.named_modules()]
    first = tuple(f"{name}.{part}." for name, part in parts if part is not None)
    named.sort(key=lambda item: not item[0].startswith(first))  # torch lists a module's own parameters first
    blocks: list[str] = []
    index: dict[nn.Parameter, int] = {}
    for name, parameter in named:
        block = _BLOCK.match(name)
        if block is not None and block[1] not in blocks:
            blocks.append(block[1])
        index[parameter] = len(blocks)
    _require_blocks(model, bool(named), len(blocks), config)
    full = len(blocks) if config.layer_decay_from == "top" else len(blocks) + 1
    lowest = 1 if config.layer_decay_from == "top" else 0
    num_decayed = len(blocks) - config.layer_decay_spared
    return {p: full - max(place, lowest) if place <= num_decayed else 0 for p, place in index.items()}


def _require_blocks(model: nn.Module, is_trained: bool, count: int, config: OptimizerConfig) -> None:
    """Raise TrainingError if the `count` trained blocks of the backbone do not suit `layer_decay`.

    A backbone that is not trained at all suits every value.
    """
    if not is_trained:
        return
    if count == 0:
        has_frozen = any(
            not p.requires_grad and _in_backbone(name.rpartition(".")[0]) and _BLOCK.match(name)
            for name, p in model.named_parameters()
        )
        problem = "the blocks of the backbone are frozen (model.freeze)" if has_frozen else "the backbone has no blocks"
        raise TrainingError(
            f"training.optimizer.layer_decay is {config.layer_decay}, which needs a backbone with trained blocks, but "
            f"{problem}; set it to 1"
        )
    if config.layer_decay_spared > count:
        raise TrainingError(
            f"training.optimizer.layer_decay_spared is {config.layer_decay_spared}, but the backbone has only {count} "
            f"trained blocks; set it to at most {count}"
        )


def _decays(module: nn.Module, name: str) -> bool:
    is_norm = isinstance(module, _NORMS) or "norm" in type(module).__name__.lower()  # timm has its own norms
    return not (is_norm or isinstance(module, nn.Embedding) or name in _POSITION_TABLES)
