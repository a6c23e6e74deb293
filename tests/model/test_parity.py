"""The whole model with its loss against `transformers`: small in the default suite, full depth at 512 px as a soak.

Batches cover edge cases: images of several sizes padded to one, an image without objects, and one with more objects
than queries.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from m2f.model.config import (
    LossConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    SwinBackboneConfig,
    TimmBackboneConfig,
)
from m2f.model.loss.criterion import compute_losses, count_normalizers
from m2f.model.mask2former import build_model
from m2f.model.segmenter import zero_outside
from m2f.model.weights.load import load_weights
from tests.model.loss_oracle import CLASSES, make_targets, transformers_losses

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SMALL_HEAD = {"feature": 32, "mask": 16, "encoder": 1, "heads": 4, "encoder_ffn": 24, "decoder": 3, "ffn": 40}
FULL_HEAD = {"feature": 256, "mask": 256, "encoder": 6, "heads": 8, "encoder_ffn": 1024, "decoder": 9, "ffn": 2048}
BACKBONES = {
    "small R50": (
        TimmBackboneConfig(name="resnet50", options={"layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32)}),
        transformers.ResNetConfig(
            embedding_size=64, hidden_sizes=[32, 64, 96, 128], depths=[1, 2, 1, 1], out_features=STAGES
        ),
    ),
    "R50": (TimmBackboneConfig(name="resnet50"), transformers.ResNetConfig(out_features=STAGES)),
    "small Swin": (
        SwinBackboneConfig(embed_dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8), window_size=3, drop_path=0.0),
        transformers.SwinConfig(
            embed_dim=16, depths=[2, 2, 2, 1], num_heads=[1, 2, 4, 8], window_size=3, out_features=STAGES
        ),
    ),
    "Swin-T": (
        SwinBackboneConfig(drop_path=0.0),
        transformers.SwinConfig(
            embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, out_features=STAGES
        ),
    ),
}


def twins(backbone: str, head: dict[str, int], queries: int):
    """Return our model and that of transformers with the same random weights."""
    our_backbone, their_backbone = BACKBONES[backbone]
    config = transformers.Mask2FormerConfig(
        backbone_config=their_backbone,
        feature_size=head["feature"],
        mask_feature_size=head["mask"],
        hidden_dim=head["feature"],
        encoder_feedforward_dim=head["encoder_ffn"],
        dim_feedforward=head["ffn"],
        encoder_layers=head["encoder"],
        decoder_layers=head["decoder"] + 1,  # also counts the learnable queries
        num_attention_heads=head["heads"],
        num_queries=queries,
        num_labels=CLASSES,
        output_auxiliary_logits=True,
    )
    torch.manual_seed(1)
    twin = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            spread = 0.3 / max(1, parameter[0].numel()) ** 0.5
            parameter.add_(torch.randn_like(parameter), alpha=4 * spread if "sampling_offsets" in name else spread)
    model = build_model(
        ModelConfig(
            backbone=our_backbone,
            pixel_decoder=MSDeformAttnPixelDecoderConfig(
                conv_dim=head["feature"],
                mask_dim=head["mask"],
                num_layers=head["encoder"],
                num_heads=head["heads"],
                feedforward_dim=head["encoder_ffn"],
            ),
            transformer_decoder=MaskedTransformerDecoderConfig(
                num_queries=queries,
                num_layers=head["decoder"],
                hidden_dim=head["feature"],
                num_heads=head["heads"],
                feedforward_dim=head["ffn"],
            ),
            num_classes=CLASSES,
        )
    ).eval()
    report = load_weights(model, twin.state_dict())
    assert report.complete, report
    return model, twin


def agree(model, twin, size: int, counts: tuple[int, ...], dtype: torch.dtype, tolerance: float, monkeypatch) -> None:
    """Assert that all predictions agree, and all loss terms at the same points."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(len(counts), 3, size, size, generator=generator)
    sizes = torch.tensor([(size - 7 * i, size - 11 * i) for i in range(len(counts))])
    images = zero_outside(images, sizes).to(dtype)
    model, twin = model.to(dtype), twin.to(dtype)
    with torch.no_grad():
        predictions, theirs = model(images), twin(pixel_values=images)
    both = [*theirs.auxiliary_logits, theirs]  # the last one has the same two fields
    class_logits = torch.stack([layer["class_queries_logits"] for layer in both])
    mask_logits = torch.stack([layer["masks_queries_logits"] for layer in both])
    own_masks = torch.einsum("lbqc,bchw->lbqhw", predictions.mask_embeddings, predictions.mask_features)
    for actual, expected in ((predictions.class_logits, class_logits), (own_masks, mask_logits)):
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)

    config = LossConfig(num_points=1024)
    targets = make_targets(counts, size=(64, 64), layers=3)
    # Enlarge the objects with the image: two objects that no point hits would have equal matching costs.
    enlarged = targets.id_maps.repeat_interleave(size // 64, 2).repeat_interleave(size // 64, 3)
    targets = dataclasses.replace(targets, id_maps=enlarged)
    terms, points = transformers_losses(class_logits.float(), mask_logits.float(), targets, config, monkeypatch)
    normalizers = count_normalizers(targets, class_logits.shape[2], config)
    losses = compute_losses(predictions, targets, points, normalizers, config, CLASSES)
    weights = torch.tensor([config.class_weight, config.mask_weight, config.dice_weight])
    torch.testing.assert_close(losses.terms, terms * weights, rtol=20 * tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("backbone", ["small R50", "small Swin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [64, 128])
def test_a_small_model_agrees(backbone, dtype, size, monkeypatch):
    agree(*twins(backbone, SMALL_HEAD, 6), size, (3, 0, 9), dtype, 1e-4, monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize("backbone", ["R50", "Swin-T"])
def test_full_depth_agrees_at_512(backbone, monkeypatch):
    # float64, because in float32 some of the 17 million mask bits depend on the order of summation.
    agree(*twins(backbone, FULL_HEAD, 100), 512, (12, 0), torch.float64, 1e-4, monkeypatch)


@pytest.mark.soak
def test_full_depth_agrees_with_more_objects_than_queries(monkeypatch):
    agree(*twins("R50", FULL_HEAD, 10), 512, (16, 3), torch.float64, 1e-4, monkeypatch)
