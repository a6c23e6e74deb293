"""Benchmark of inference, from a normalised image to its panoptic result, against `transformers`.

The peer's post-processing is `official_order.plain_panoptic`. A network with random weights has no
confident queries. Post-processing therefore runs on a generated prediction of the same shape, in which twelve queries
compete for pixels. The logits of both networks and both results must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.measure import Measurement, compare, without_tf32
from benchmarks.peers.official_order import plain_panoptic
from benchmarks.peers.transformers_peer import CONFIG, twins
from benchmarks.synthetic_batches import CLASSES, confident_predictions
from m2f.model.cpu_products import fast_cpu_products
from m2f.model.inference.cuda_graphs import replay_forward
from m2f.model.inference.mask_resize import ImageGeometry
from m2f.model.inference.postprocess import panoptic
from m2f.model.inference.precision import deterministic_convolutions, set_precision
from m2f.model.structures import Predictions

IS_THING = [k < 80 for k in range(CLASSES)]


def run(tiny: bool, device: torch.device) -> list[Measurement]:
    """Measure batch 1 (on a GPU also 8) at 800 x 1344 pixels (`tiny` on a CPU: 256 x 384)."""
    if device.type == "cpu":
        return [_case(1, (256, 384) if tiny else (800, 1344), device, repeats=3)]
    return [_case(images, (800, 1344), device, repeats=20) for images in ((1,) if tiny else (1, 8))]


@torch.inference_mode()
def _case(images: int, size: tuple[int, int], device: torch.device, repeats: int) -> Measurement:
    precision: Literal["fp32", "bf16"] = "fp32" if device.type == "cpu" else "bf16"
    ours, theirs = (model.eval().to(device) for model in twins())
    pixels = torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    _check_agreement(ours, theirs, pixels)
    forward = _product_forward(ours, precision)
    memory_format = torch.contiguous_format if device.type == "cpu" else torch.channels_last  # as `normalise` returns
    our_pixels = pixels.contiguous(memory_format=memory_format)
    geometry = ImageGeometry(size, size, size)
    classes, embeddings, features = (tensor.to(device) for tensor in confident_predictions(size, CLASSES))
    masks = torch.einsum("qc,chw->qhw", embeddings, features)  # the forward pass of transformers ends with this product
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def run_ours() -> Sequence[Tensor]:
        forward(our_pixels)
        results = (panoptic(classes, embeddings, features, geometry, IS_THING, CONFIG.postprocess) for _ in pixels)
        return [result.segment_map for result in results]

    def run_transformers() -> Sequence[Tensor]:
        with autocast:
            theirs(pixel_values=pixels)
        return [plain_panoptic(classes, masks, geometry, IS_THING, CONFIG.postprocess) for _ in pixels]

    return compare(
        f"R50 inference {precision}",
        f"{images} x {size[0]} x {size[1]}",
        run_ours,
        "transformers + plain",
        run_transformers,
        tolerance=0.0,
        repeats=repeats,
        device=device,
        memory=True,
    )


def _product_forward(model: nn.Module, precision: Literal["fp32", "bf16"]) -> Callable[[Tensor], Predictions]:
    """Set up a model as evaluation and `m2f predict` do, and return its forward pass."""
    set_precision(model, precision)
    replay_forward(model)

    def forward(pixels: Tensor) -> Predictions:
        with deterministic_convolutions(), fast_cpu_products(pixels.device):
            return model(pixels)

    return forward


def _check_agreement(ours: nn.Module, theirs: nn.Module, pixels: Tensor) -> None:
    """Raise AssertionError if the logits of the models differ in fp32."""
    with without_tf32():
        found, expected = ours(pixels), theirs(pixel_values=pixels)
    torch.testing.assert_close(found.class_logits[-1], expected.class_queries_logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.mask_logits(), expected.masks_queries_logits, rtol=1e-3, atol=1e-3)
