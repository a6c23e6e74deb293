"""Recorded attention against the outputs of the layers, and foreground shares against values computed by hand."""

from dataclasses import replace

import pytest
import torch

from m2f.model.analysis.attention_maps import AttentionMap, attention_weights, foreground_mass, recorded_attention
from m2f.model.attention import MaskPooling, ProjectedAttention
from m2f.model.config import (
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    StandardTransformerDecoderConfig,
    TimmBackboneConfig,
)
from m2f.model.mask2former import build_model

SIZES = {"multi_scale": [(2, 3), (4, 6), (8, 12), (2, 3)], "stride_16": [(4, 6)] * 4}


def small_model(**decoder):
    torch.manual_seed(0)
    settings = MaskedTransformerDecoderConfig(
        num_queries=5, num_layers=4, hidden_dim=32, num_heads=2, feedforward_dim=32, **decoder
    )
    config = ModelConfig(
        backbone=TimmBackboneConfig(name="resnet10t", norm="group", options={"channels": [16, 16, 32, 32]}),
        pixel_decoder=MSDeformAttnPixelDecoderConfig(conv_dim=32, mask_dim=16, num_layers=1, num_heads=2),
        transformer_decoder=settings,
        num_classes=3,
    )
    return build_model(config, pretrained_backbone=False).eval(), config


@pytest.mark.parametrize("attention", ["masked", "cross", "smca", "mask_pooling"])
@pytest.mark.parametrize("features", ["multi_scale", "naive_multi_scale", "stride_16"])
def test_every_layer_is_recorded_with_its_levels(attention, features):
    model, _ = small_model(attention=attention, features=features)
    with torch.no_grad(), recorded_attention(model) as maps:
        model(torch.randn(2, 3, 64, 96))
    assert [m.layer for m in maps] == [1, 2, 3, 4]
    if features == "naive_multi_scale":
        assert all(m.shapes == ((2, 3), (4, 6), (8, 12)) and m.strides == (32, 16, 8) for m in maps)
        assert maps[0].level_name == "1/32 + 1/16 + 1/8"
    else:
        assert [m.shapes for m in maps] == [(shape,) for shape in SIZES[features]]
        assert [m.strides[0] * m.shapes[0][1] for m in maps] == [96] * 4
    for m in maps:
        torch.testing.assert_close(m.weights.sum(-1), torch.ones(2, 5))
        assert sum(level.numel() for level in m.level_maps(1, 4)) == m.weights.shape[-1]


def test_recording_ends_with_the_context_and_leaves_outputs_unchanged():
    model, _ = small_model()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        with recorded_attention(model) as maps:
            during = model(images)
        model(images)
    assert len(maps) == 4
    assert torch.equal(before.class_logits, during.class_logits)


@pytest.mark.parametrize("guide", [None, "mask", "prior"])
def test_recorded_weights_are_those_applied_to_the_values(guide):
    torch.manual_seed(1)
    attend = ProjectedAttention(8, 1, 0.0).eval()
    query, key, value = torch.randn(2, 3, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    allowed = torch.rand(2, 1, 3, 7) > 0.4
    allowed[..., 0] = True
    mask = {None: None, "mask": allowed, "prior": torch.randn(2, 1, 3, 7)}[guide]
    weights = attention_weights(attend, query, key, value, *([] if mask is None else [mask]))
    torch.testing.assert_close(attend.output(weights @ value), attend(query, key, value, mask))
    if guide == "mask":
        assert (weights[~allowed[:, 0]] == 0).all()


def test_weights_are_the_mean_over_heads():
    attend = ProjectedAttention(2, 2, 0.0)
    query, key = torch.tensor([[[20.0, 0.0]]]), torch.tensor([[[1.0, 5.0], [0.0, 5.0]]])
    weights = attention_weights(attend, query, key, key)  # head 1: only the first pixel; head 2: both equally
    torch.testing.assert_close(weights, torch.tensor([[[0.75, 0.25]]]), atol=1e-6, rtol=0)


def test_mask_pooling_weights_all_pixels_in_its_mask_equally():
    mask = torch.tensor([[[[True, False, True, True]]]])
    weights = attention_weights(MaskPooling(4, 0.0), torch.randn(1, 4, 4), mask)
    torch.testing.assert_close(weights, torch.tensor([[[1 / 3, 0, 1 / 3, 1 / 3]]]))


def test_a_standard_decoder_attends_to_the_coarsest_level():
    _, config = small_model()
    decoder = StandardTransformerDecoderConfig(num_queries=5, num_layers=2, hidden_dim=32, num_heads=2)
    model = build_model(replace(config, transformer_decoder=decoder), pretrained_backbone=False).eval()
    with torch.no_grad(), recorded_attention(model) as maps:
        model(torch.randn(1, 3, 64, 96))
    assert [(m.shapes, m.level_name) for m in maps] == [(((2, 3),), "1/32")] * 2


def test_uniform_attention_on_an_object_equals_its_share_of_the_area():
    masks = torch.zeros(2, 32, 64, dtype=torch.bool)
    masks[0, :, :16] = True  # a quarter
    masks[1, :20, :20] = True  # 400 of 2048 pixels
    uniform = torch.full((2, 8), 1 / 8)
    share = foreground_mass(uniform, [(2, 4)], masks)
    torch.testing.assert_close(share, torch.tensor([0.25, 400 / 2048]))


def test_foreground_share_over_two_levels_equals_hand_computed_value():
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 0, 0] = True
    # One pixel of the coarse level (a sixteenth covered) and four of the fine one (the first a quarter covered).
    weights = torch.tensor([[0.5, 0.3, 0.1, 0.1, 0.0]])
    share = foreground_mass(weights, [(1, 1), (2, 2)], masks)
    torch.testing.assert_close(share, torch.tensor([0.5 / 16 + 0.3 / 4]))


def test_level_maps_split_the_weights_in_level_order():
    attention = AttentionMap(1, (16, 8), ((1, 2), (2, 4)), torch.arange(10.0).view(1, 1, 10))
    coarse, fine = attention.level_maps(0, 0)
    assert coarse.tolist() == [[0, 1]]
    assert fine.tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]
