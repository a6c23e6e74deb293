import pytest
import torch
import torch.nn.functional as F

from m2f.model.attention import attention_mask, resize_for_attention
from m2f.model.config import MaskedTransformerDecoderConfig
from m2f.model.errors import ConfigError
from m2f.model.transformer_decoder.masked import MaskedTransformerDecoder

SMALL = MaskedTransformerDecoderConfig(num_queries=6, num_layers=4, hidden_dim=32, num_heads=4, feedforward_dim=48)
SIZES = ((2, 3), (4, 6), (8, 12))


def random_inputs(dim=32, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(batch, dim, *size, generator=generator) for size in SIZES]
    return features, torch.randn(batch, 16, 16, 24, generator=generator)


def test_mask_equals_resized_logits_and_opens_empty_rows():
    _, mask_features = random_inputs()
    embeddings = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    embeddings[0, 2] = 0.0  # logit 0 everywhere: allowed
    mask_features[:, 0] = 1.0
    embeddings[1, 3] = 0.0
    embeddings[1, 3, 0] = -1.0  # negative everywhere: an empty mask
    logits = F.interpolate(torch.einsum("bqc,bchw->bqhw", embeddings, mask_features), (4, 6), mode="bilinear")
    blocked = logits.flatten(2).sigmoid() < 0.5
    assert blocked[1, 3].all()
    blocked[blocked.all(-1)] = False
    actual = attention_mask(embeddings, resize_for_attention(mask_features, (4, 6)))
    assert actual.shape == (2, 1, 6, 24)
    assert torch.equal(actual[:, 0], ~blocked)
    assert actual[0, 0, 2].all()


def test_mask_is_accumulated_in_float32_under_autocast():
    embeddings = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    features = torch.randn(1, 64, 9, 9, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        resized = resize_for_attention(features, (5, 5))
        mask = attention_mask(embeddings, resized)
    assert resized.dtype == torch.float32
    assert torch.equal(mask[:, 0], (embeddings.float() @ resized) >= 0)


@pytest.mark.parametrize("in_dim", [32, 20])
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_every_parameter_gets_a_gradient(num_layers, in_dim):
    torch.manual_seed(0)
    config = MaskedTransformerDecoderConfig(
        num_queries=6, num_layers=num_layers, hidden_dim=32, num_heads=4, feedforward_dim=48
    )
    decoder = MaskedTransformerDecoder(config, in_dim, 16, num_classes=5)
    predictions = decoder(*random_inputs(in_dim))
    assert predictions.class_logits.shape == (num_layers + 1, 2, 6, 6)
    assert predictions.mask_embeddings.shape == (num_layers + 1, 2, 6, 16)
    assert predictions.mask_logits(0).shape == (2, 6, 16, 24)
    sum(p.square().sum() for p in predictions[:2]).backward()
    without = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    # A key bias shifts all logits of a query equally, so softmax cancels it up to rounding.
    assert [name for name in without if "key.bias" not in name] == []


def test_the_attention_mask_carries_no_gradient():
    decoder = MaskedTransformerDecoder(SMALL, 32, 16, num_classes=5)
    features, mask_features = random_inputs()
    mask_features.requires_grad_()
    predictions = decoder(features, mask_features)
    (gradient,) = torch.autograd.grad(predictions.class_logits.sum(), mask_features, allow_unused=True)
    assert gradient is None


def test_first_prediction_does_not_depend_on_the_image():
    decoder = MaskedTransformerDecoder(SMALL, 32, 16, num_classes=5).eval()
    first, second = (decoder(*random_inputs(seed=seed)) for seed in (0, 1))
    assert torch.equal(first.class_logits[0], second.class_logits[0])
    assert not torch.equal(first.class_logits[1], second.class_logits[1])


def test_input_projections_exist_only_where_dimensions_differ():
    equal = MaskedTransformerDecoder(SMALL, 32, 16, num_classes=5)
    different = MaskedTransformerDecoder(SMALL, 20, 16, num_classes=5)
    assert not any("input_proj" in name for name in equal.state_dict())
    assert sum("input_proj" in name for name in different.state_dict()) == 6


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    decoder = MaskedTransformerDecoder(SMALL, 32, 16, num_classes=5)

    def spread(weight, bound):
        return 0.9 * bound < weight.abs().max().item() <= bound * (1 + 1e-6)

    packed = (6 / (32 + 96)) ** 0.5
    layer = decoder.layers[0]
    for linear in (layer.cross_query, layer.self_query_key, layer.self_value, decoder.memories[0].key):
        assert spread(linear.weight, packed)
        assert linear.bias.abs().max() == 0
    assert spread(layer.cross.output.weight, (6 / 64) ** 0.5)
    assert layer.cross.output.bias.abs().max() == 0
    assert spread(layer.linear1.weight, (6 / (32 + 48)) ** 0.5)
    assert spread(layer.linear1.bias, 32**-0.5)
    assert spread(decoder.class_embed.weight, 32**-0.5)
    for embedding in (decoder.query_feat, decoder.query_embed, decoder.level_embed):
        assert 0.7 < embedding.weight.std() < 1.3


def test_invalid_decoder_settings_are_refused():
    with pytest.raises(ConfigError, match="num_layers is 0"):
        MaskedTransformerDecoderConfig(num_layers=0)
    with pytest.raises(ConfigError, match="hidden_dim is 30"):
        MaskedTransformerDecoder(MaskedTransformerDecoderConfig(hidden_dim=30, num_heads=2), 30, 16, num_classes=5)
