"""Parameter groups of the official optimizer, merged: same maths, at most four groups instead of one per tensor."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.config import OptimizerConfig
from trainer.errors import TrainingError

_NORMS = (
    nn.modules.batchnorm._NormBase,  # every batch and instance norm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
_POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed")


def build_param_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups `{name, params, lr, weight_decay}` for torch.optim.AdamW.

    No decay on norms, `nn.Embedding` and the position tables of Swin; all else decays, biases included. Everything
    under the submodule `backbone` takes `lr * backbone_lr_multiplier`. Raises TrainingError where nothing is trainable.
    """
    merged: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            in_backbone = "backbone" in module_name.split(".")
            merged.setdefault((in_backbone, _decays(module, name)), []).append(parameter)
    if not merged:
        raise TrainingError("the model has no trainable parameter; check the backbone's and the model's settings")
    return [
        {
            "name": f"{'backbone' if in_backbone else 'head'}{'' if decays else '_no_decay'}",
            "params": merged[in_backbone, decays],
            "lr": config.lr * (config.backbone_lr_multiplier if in_backbone else 1.0),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for in_backbone, decays in sorted(merged, reverse=True)
    ]


def _decays(module: nn.Module, name: str) -> bool:
    is_norm = isinstance(module, _NORMS) or "norm" in type(module).__name__.lower()  # timm has its own norms
    return not (is_norm or isinstance(module, nn.Embedding) or name in _POSITION_TABLES)
