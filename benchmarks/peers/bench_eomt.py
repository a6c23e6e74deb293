"""Benchmark of a training step of EoMT (ViT-S, 200 queries) against `transformers`, including matching and backward.

Both have the same weights, images and targets. `transformers` draws its own random points, so only the logits must
agree closely; losses may differ because of different points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn

from benchmarks.measure import Measurement, compare, relative_error
from benchmarks.synthetic_batches import CLASSES, dense_masks, make_batch
from m2f.data_pipeline.transforms.collate import Batch
from m2f.model.config import EomtDecoderConfig, ModelConfig, TimmBackboneConfig, UpscalePixelDecoderConfig
from m2f.model.cpu_products import fast_cpu_products
from m2f.model.loss.criterion import count_normalizers
from m2f.model.mask2former import build_model
from m2f.model.segmenter import Segmenter
from m2f.model.weights.load import load_weights
from m2f.trainer.engine.module import TrainingModule

QUERIES, OBJECTS = 200, 10
"""Queries of the published models for COCO, and objects per image, about as many as in COCO."""
LOSS_TOLERANCE = 0.03
"""Largest relative difference of the losses. Losses at different random points differ by about one per cent."""
LOGITS_TOLERANCE = 1e-4
"""Largest relative difference of the logits from those of the peer, for the same weights and images."""


def run(tiny: bool, device: torch.device) -> list[Measurement]:
    """Measure a batch of 2 images at 512 pixels (`tiny`: 256)."""
    size = 256 if tiny else 512
    batch = make_batch(2, size, OBJECTS).to(device)
    theirs, ours, config = _twins(size, device)
    _check_logits(ours, theirs, batch)
    module = TrainingModule(ours, config, 0, "fp32")
    masks, labels = dense_masks(batch.targets), list(batch.targets.labels)

    @fast_cpu_products(device)
    def our_step() -> Sequence[Tensor]:
        module.zero_grad()
        total = module(batch, count_normalizers(batch.targets, QUERIES, config.loss)).total
        total.backward()
        return (total.detach(),)

    def transformers_step() -> Sequence[Tensor]:
        theirs.zero_grad()
        loss = theirs(ours.normalise(batch.images), mask_labels=masks, class_labels=labels).loss
        loss.backward()
        return (loss.detach().reshape(()),)

    repeats = 2 if tiny else 5
    return [
        compare(
            "EoMT-S training step",
            f"2 x {size} x {size}",
            our_step,
            "transformers",
            transformers_step,
            LOSS_TOLERANCE,
            repeats,
            device,
            memory=True,
        )
    ]


def _twins(size: int, device: torch.device) -> tuple[nn.Module, Segmenter, ModelConfig]:
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "num_blocks": 3}
    settings = transformers.EomtConfig(**shape, image_size=size, num_queries=QUERIES, num_labels=CLASSES)
    theirs = transformers.EomtForUniversalSegmentation(settings).to(device)
    config = ModelConfig(
        backbone=TimmBackboneConfig(
            name="vit_small_patch14_reg4_dinov2", features="tokens", options={"img_size": size}
        ),
        pixel_decoder=UpscalePixelDecoderConfig(),
        transformer_decoder=EomtDecoderConfig(num_queries=QUERIES, num_layers=3),
        num_classes=CLASSES,
    )
    ours = build_model(config, pretrained_backbone=False).to(device)
    assert load_weights(ours, dict(theirs.state_dict())).complete
    return theirs.train(), ours.train(), config


@torch.no_grad()
def _check_logits(ours: Segmenter, theirs: nn.Module, batch: Batch) -> None:
    """Assert that the last predictions agree in training mode, in which attention masks are used."""
    pixels = ours.normalise(batch.images)
    actual, expected = ours(pixels), theirs(pixels)
    error = max(
        relative_error(actual.class_logits[-1], expected.class_queries_logits),
        relative_error(actual.mask_logits(), expected.masks_queries_logits),
    )
    assert error <= LOGITS_TOLERANCE, f"logits differ by {error:.1e}, more than {LOGITS_TOLERANCE:.1e}"
