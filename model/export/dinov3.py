"""Checkpoints of DINOv3's segmentation head: weights under its names, without a frozen vision transformer."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from m2f.model.config import ModelConfig
from m2f.model.errors import WeightsError
from m2f.model.segmenter import Segmenter
from m2f.model.weights.names import to_dinov3_names

_FIXED = {
    "backbone": {"num_heads": 16, "stem_width": 64},
    "pixel_decoder": {
        "kind": "ms_deform_attn",
        "num_heads": 16,
        "num_points": 4,
        "num_layers": 6,
        "feedforward_dim": 4096,
    },
    "transformer_decoder": {
        "kind": "masked",
        "num_heads": 16,
        "num_layers": 9,
        "num_queries": 100,
        "feedforward_dim": 4096,
        "attention": "masked",
        "features": "multi_scale",
        "queries": "supervised",
        "cross_attention_first": True,
        "pre_norm": False,
    },
}
"""Settings that DINOv3's code fixes."""
_VIT = "segmentation_model.0.backbone."


def export_dinov3(model: Segmenter, config: ModelConfig) -> OrderedDict[str, Tensor]:
    """Return weights under DINOv3's names, on the CPU.

    A frozen vision transformer is left out, as in the published file. Raises WeightsError with the setting that DINOv3
    does not have.
    """
    require_dinov3(config)
    is_frozen = not {"backbone", "backbone.vit"}.isdisjoint(config.freeze)
    names = to_dinov3_names(model.state_dict())
    kept = {name: tensor for name, tensor in names.items() if not (is_frozen and name.startswith(_VIT))}
    return OrderedDict((name, tensor.cpu().contiguous()) for name, tensor in kept.items())


def require_dinov3(config: ModelConfig) -> None:
    """Raise WeightsError with the first setting that DINOv3's segmentation head does not have."""
    for section, settings in _FIXED.items():
        for name, required in settings.items():
            found = getattr(getattr(config, section), name, None)
            if found != required:
                raise _unsupported(f"{section}.{name}", found, f"only {required!r}")
    widths = {
        "pixel_decoder.conv_dim": getattr(config.pixel_decoder, "conv_dim", None),
        "pixel_decoder.mask_dim": getattr(config.pixel_decoder, "mask_dim", None),
    }
    for name, width in widths.items():
        if width != (hidden := getattr(config.transformer_decoder, "hidden_dim", None)):
            raise _unsupported(name, width, f"only the value of model.transformer_decoder.hidden_dim ({hidden})")


def _unsupported(setting: str, value: object, required: str) -> WeightsError:
    return WeightsError(
        f"model.{setting} is {value!r}; DINOv3's segmentation head supports {required}. Export as torch_export or "
        "onnx, or use the weights with m2f"
    )
