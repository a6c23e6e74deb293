"""Export models to other formats: Hugging Face folders, torch.export and ONNX."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as export_settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._sympy.value_ranges import ValueRanges

from m2f.model.config import ModelConfig
from m2f.model.deform_attn.module import for_export
from m2f.model.eomt.eomt import Eomt
from m2f.model.errors import WeightsError
from m2f.model.export.hugging_face import write_hugging_face_config
from m2f.model.segmenter import Segmenter
from m2f.model.weights.eomt import eomt_to_transformers
from m2f.model.weights.names import to_hugging_face_names

_OPSET = 20
"""Operator set of the ONNX files: that of ONNX 1.15."""
_SIDE_MULTIPLE = 32
"""Divisor of the image sides in an exported graph: the largest stride, so that no map is padded."""
_MIN_SIDE, _MAX_SIDE = 64, 16384
"""Minimum and maximum height and width, in pixels, of images in an exported graph."""


class Inference(nn.Module):
    """The exported graph: takes pixels and returns the predictions of the last layer."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits [B, Q, K + 1] ("no object" last) and mask logits [B, Q, H / 4, W / 4].

        `images` [B, 3, H, W] are RGB, float32 in 0..255. H and W must be divisible by 32.
        """
        batch, channels, height, width = images.shape
        # Multiples of 32 in the shape itself let torch.export express the sizes of all maps by two numbers.
        images = images.view(
            batch, channels, height // _SIDE_MULTIPLE * _SIDE_MULTIPLE, width // _SIDE_MULTIPLE * _SIDE_MULTIPLE
        )
        predictions = self.model(self.model.normalise(images))
        return predictions.class_logits[-1], predictions.mask_logits()


def export_hugging_face(
    model: Segmenter,
    config: ModelConfig,
    folder: Path,
    labels: Sequence[str],
    *,
    notes: Mapping[str, Any] | None = None,
    shortest_edge: int = 800,
    max_size: int = 1333,
) -> None:
    """Write a folder that `Mask2FormerForUniversalSegmentation.from_pretrained` opens, with its image processor.

    An EoMT is written for `EomtForUniversalSegmentation` or `EomtDinov3ForUniversalSegmentation` instead.

    Args:
        model: model to write.
        config: settings of the model.
        folder: folder to write, created if necessary.
        labels: names of the classes.
        notes: stored under the key `m2f` of config.json.
        shortest_edge: length in pixels to which the shorter side of images is resized.
        max_size: maximum length of the longer side, in pixels.

    Raises:
        WeightsError: Hugging Face has no such model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_hugging_face_config(folder, config, labels, notes or {}, shortest_edge, max_size)
    convert_names = eomt_to_transformers if isinstance(model, Eomt) else to_hugging_face_names
    state = convert_names(model.state_dict())
    state = _contiguous(state | _unused_by_inference(state, len(labels), config))
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _unused_by_inference(state: Mapping[str, Tensor], num_classes: int, config: ModelConfig) -> dict[str, Tensor]:
    """Return tensors that Hugging Face's module has besides our weights.

    With them, it reports no missing tensors on loading.
    """
    empty_weight = torch.ones(num_classes + 1)
    empty_weight[-1] = config.loss.no_object_weight
    unused = {"criterion.empty_weight": empty_weight}
    for name, tensor in state.items():
        if name.endswith("normalization.running_var"):
            unused[name.replace("running_var", "num_batches_tracked")] = torch.zeros((), dtype=torch.int64)
        if ".hidden_states_norms.stage4." in name:
            unused[name.replace("hidden_states_norms.stage4", "swin.layernorm")] = tensor
    return unused


def export_program(model: Segmenter, size: tuple[int, int] | None = None) -> torch.export.ExportedProgram:
    """Return the graph of `Inference` for any number of images, on the device of the model.

    Height and width are free multiples of 32 from 64 to 16384 pixels, or fixed to `size` if given. Raises WeightsError
    if `size` is not a multiple of 32 or is below 64.
    """
    if size is not None and (min(size) < _MIN_SIDE or any(side % _SIDE_MULTIPLE for side in size)):
        raise WeightsError(
            f"--size is {size[0]} {size[1]}; height and width must be at least {_MIN_SIDE} and divisible by "
            f"{_SIDE_MULTIPLE}"
        )
    shapes: dict[int, Any] = {0: torch.export.Dim("batch", min=2, max=_MAX_SIDE)}
    if size is None:
        limits = {"min": _MIN_SIDE // _SIDE_MULTIPLE, "max": _MAX_SIDE // _SIDE_MULTIPLE}
        shapes |= {
            axis: _SIDE_MULTIPLE * torch.export.Dim(name, **limits) for axis, name in ((2, "rows"), (3, "columns"))
        }
    height, width = size or (_MIN_SIDE, _MIN_SIDE + _SIDE_MULTIPLE)
    images = torch.zeros(2, 3, height, width, device=next(model.parameters()).device)
    # Without `backed_size_oblivious`, every size that may be 1, such as the number of windows, is a separate case:
    # tracing would be slow, and a Swin's graph would accept large images only.
    # pyrefly: ignore[missing-attribute] - the module gets `patch` when it is imported
    with torch.no_grad(), for_export(), export_settings.patch(backed_size_oblivious=True):
        program = torch.export.export(Inference(model).eval(), (images,), dynamic_shapes={"images": shapes})
    _allow_single_images(program)
    return program


def _allow_single_images(program: torch.export.ExportedProgram) -> None:
    """Allow a single image in a graph that was traced for two images or more.

    Tracing inspects strides, which are ambiguous for a single image, so it needs at least two images. The traced graph
    is valid for one image, too.
    """
    images = next(node for node in program.graph.nodes if node.name == "images")
    program.range_constraints[images.meta["val"].shape[0].node.expr] = ValueRanges(1, _MAX_SIDE)


def write_program(program: torch.export.ExportedProgram, path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Save a graph that `torch.export.load` opens (.pt2). The notes are its `extra_files`."""
    torch.export.save(program, path, extra_files=dict(notes or {}))


def require_onnx() -> None:
    """Raise WeightsError if the packages that write ONNX are not installed."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise WeightsError(f"ONNX export needs the packages {' and '.join(missing)}: pip install 'm2f[export]'")


def write_onnx(program: torch.export.ExportedProgram, path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Save a graph as ONNX with its weights; the notes become `metadata_props`.

    Weights above 1.5 GiB are saved beside it, in `NAME.onnx.data`, whose name the graph states.

    Raises WeightsError as `require_onnx`, and if the graph interpolates learned positions.
    """
    require_onnx()
    if any("_upsample_bicubic2d_aa" in str(node.target) for node in program.graph.nodes):
        raise WeightsError(
            "ONNX has no operation that interpolates this model's learned positions; set --size to "
            "model.backbone.options.img_size, the size for which they are stored, or export as torch_export"
        )
    names = {"input_names": ["images"], "output_names": ["class_logits", "mask_logits"]}
    # Fused attention returns another memory layout than the plain form that the conversion uses.
    with sdpa_kernel(SDPBackend.MATH):
        onnx_program = torch.onnx.export(program, dynamo=True, opset_version=_OPSET, verbose=False, **names)
    assert onnx_program is not None
    onnx_program.model.metadata_props.update(notes or {})
    onnx_program.save(path)


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, each in its own memory, because parts of packed matrices share memory."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
