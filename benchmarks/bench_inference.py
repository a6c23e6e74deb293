"""Benchmark of inference, from a normalised image to its panoptic result, against `transformers`.

The peer's post-processing is `official_order.plain_panoptic`. A network with random weights has no
confident queries. Post-processing therefore runs on a generated prediction of the same shape, in which twelve queries
compete for pixels. The logits of both networks and both results must agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from benchmarks.measure import Measurement, compare
from benchmarks.official_order import plain_panoptic
from benchmarks.synthetic_batches import CLASSES, confident_predictions
from benchmarks.transformers_peer import CONFIG, twins
from m2f.model.inference.cuda_graphs import replay_forward
from m2f.model.inference.mask_resize import ImageGeometry
from m2f.model.inference.postprocess import panoptic
from m2f.model.structures import Predictions

IS_THING = [k < 80 for k in range(CLASSES)]


def run(tiny: bool, device: torch.device) -> list[Measurement]:
    """Measure batch 1 (on a GPU also 8) at 800 x 1344 pixels (`tiny` on a CPU: 256 x 384)."""
    if device.type == "cpu":
        return [_case(1, (256, 384) if tiny else (800, 1344), device, repeats=3)]
    return [_case(images, (800, 1344), device, repeats=20) for images in ((1,) if tiny else (1, 8))]


@torch.inference_mode()
def _case(images: int, size: tuple[int, int], device: torch.device, repeats: int) -> Measurement:
    ours, theirs = (model.eval().to(device) for model in twins())
    pixels = torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    _check_agreement(ours(pixels), theirs(pixel_values=pixels))
    replay_forward(ours)
    memory_format = torch.contiguous_format if device.type == "cpu" else torch.channels_last  # as `normalise` returns
    our_pixels = pixels.contiguous(memory_format=memory_format)
    geometry = ImageGeometry(size, size, size)
    classes, embeddings, features = (tensor.to(device) for tensor in confident_predictions(size, CLASSES))
    masks = torch.einsum("qc,chw->qhw", embeddings, features)  # the forward pass of transformers ends with this product
    precision = torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")

    def run_ours() -> Sequence[Tensor]:
        with precision:
            ours(our_pixels)
        results = (panoptic(classes, embeddings, features, geometry, IS_THING, CONFIG.postprocess) for _ in pixels)
        return [result.segment_map for result in results]

    def run_transformers() -> Sequence[Tensor]:
        with precision:
            theirs(pixel_values=pixels)
        return [plain_panoptic(classes, masks, geometry, IS_THING, CONFIG.postprocess) for _ in pixels]

    return compare(
        f"R50 inference {'fp32' if device.type == 'cpu' else 'bf16'}",
        f"{images} x {size[0]} x {size[1]}",
        run_ours,
        "transformers + plain",
        run_transformers,
        tolerance=0.0,
        repeats=repeats,
        device=device,
        memory=True,
    )


def _check_agreement(ours: Predictions, theirs: Mask2FormerForUniversalSegmentationOutput) -> None:
    torch.testing.assert_close(ours.class_logits[-1], theirs.class_queries_logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.mask_logits(), theirs.masks_queries_logits, rtol=1e-3, atol=1e-3)
