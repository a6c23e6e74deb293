"""The graphs of a training step do not grow."""

import pytest
import torch

from benchmarks.count_kernels import count_regions as count_kernels
from benchmarks.count_nodes import count_constants, count_regions, fake_tensors
from m2f.model.config import (
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    TimmBackboneConfig,
)
from m2f.model.mask2former import build_model

CONFIG = ModelConfig(
    num_classes=3,
    backbone=TimmBackboneConfig(name="resnet18", pretrained=False),
    pixel_decoder=MSDeformAttnPixelDecoderConfig(
        conv_dim=32, mask_dim=32, feedforward_dim=32, num_heads=2, num_layers=2
    ),
    transformer_decoder=MaskedTransformerDecoderConfig(
        hidden_dim=32, num_heads=2, num_queries=5, num_layers=3, feedforward_dim=32
    ),
)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo reads it of fake tensors
def test_graphs_of_a_training_step_stay_within_their_operation_counts():
    torch.compiler.reset()
    with fake_tensors():
        model = build_model(CONFIG, pretrained_backbone=False).train()
        kept = count_constants(model, 128)
        counts = count_regions(model, lambda: torch.zeros(2, 3, 128, 128))
    backbone, pixel_decoder, transformer_decoder = counts
    assert pixel_decoder.fused_attention == 2
    assert backbone.forward <= 240
    assert pixel_decoder.forward + pixel_decoder.backward <= 310
    assert transformer_decoder.forward + transformer_decoder.backward <= 640
    assert min(kept.values()) > 20


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_inductor_fuses_a_training_step_into_few_kernels():
    torch.compiler.reset()
    with fake_tensors():
        model = build_model(CONFIG, pretrained_backbone=False).train()
        backbone, pixel_decoder, transformer_decoder = count_kernels(model, lambda: torch.zeros(2, 3, 64, 64))
    for region, most in ((backbone, 70), (pixel_decoder, 100), (transformer_decoder, 165)):
        assert region.forward.library >= 10
        assert region.forward.generated + region.forward.library <= most
