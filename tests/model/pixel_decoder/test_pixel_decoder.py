import numpy as np
import pytest
import torch

from m2f.model.config import MSDeformAttnPixelDecoderConfig
from m2f.model.pixel_decoder import MSDeformAttnPixelDecoder
from m2f.model.weights.load import to_own_names

SMALL = MSDeformAttnPixelDecoderConfig(conv_dim=64, mask_dim=32, num_layers=2, num_heads=4, feedforward_dim=96)
CHANNELS = (8, 12, 16, 20)


def own_names(golden, prefix):
    official = {
        f"sem_seg_head.pixel_decoder.{key.removeprefix(prefix)}": torch.from_numpy(value)
        for key, value in golden.items()
        if key.startswith(prefix)
    }
    return {key.removeprefix("pixel_decoder."): value for key, value in to_own_names(official, "official").items()}


def test_pixel_decoder_and_its_gradients_equal_the_official_ones(goldens):
    golden = np.load(goldens / "b_pixel_decoder_reduced.npz")
    decoder = MSDeformAttnPixelDecoder(SMALL, CHANNELS)
    decoder.load_state_dict(own_names(golden, "w_"))
    features = [torch.from_numpy(golden[f"in_res{i}"]).requires_grad_() for i in range(2, 6)]
    mask_features, maps = decoder(features)
    outputs = {"mask_features": mask_features, **{f"ms{i}": level for i, level in enumerate(maps)}}
    for name, output in outputs.items():
        torch.testing.assert_close(output, torch.from_numpy(golden[name]), rtol=0, atol=2e-5, msg=name)
    sum((output * torch.from_numpy(golden[f"cot_{name}"])).sum() for name, output in outputs.items()).backward()
    for i, feature in enumerate(features, start=2):
        expected = torch.from_numpy(golden[f"grad_in_res{i}"])
        torch.testing.assert_close(feature.grad, expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())
    for name, expected in own_names(golden, "g_").items():
        actual = decoder.get_parameter(name).grad
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item(), msg=name)


def test_maps_come_coarsest_first_and_odd_sizes_work():
    decoder = MSDeformAttnPixelDecoder(SMALL, CHANNELS)
    sizes = [(13, 19), (7, 10), (4, 5), (2, 3)]
    features = [torch.randn(1, c, *size) for c, size in zip(CHANNELS, sizes, strict=True)]
    mask_features, maps = decoder(features)
    assert mask_features.shape == (1, 32, 13, 19)
    assert [tuple(level.shape[2:]) for level in maps] == sizes[:0:-1]


@pytest.mark.parametrize("mode", ["autocast", "parameters"])
def test_bfloat16_is_close_to_float32(mode):
    torch.manual_seed(0)
    decoder = MSDeformAttnPixelDecoder(SMALL, CHANNELS)
    features = [torch.randn(1, c, 24 // 2**i, 32 // 2**i) for i, c in enumerate(CHANNELS)]
    with torch.no_grad():
        exact = decoder(features)[0]
        if mode == "parameters":
            decoder, features = decoder.bfloat16(), [feature.bfloat16() for feature in features]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            mask_features, maps = decoder(features)
    assert maps[0].dtype == (torch.float32 if mode == "autocast" else torch.bfloat16)
    assert (mask_features.float() - exact).abs().max() < 0.06 * exact.abs().max()


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    decoder = MSDeformAttnPixelDecoder(SMALL, CHANNELS)

    def spread(weight, bound):
        return 0.9 * bound < weight.abs().max().item() <= bound * (1 + 1e-6)

    layer = decoder.layers[0]
    assert spread(layer.linear1.weight, (6 / (64 + 96)) ** 0.5)
    assert spread(layer.linear1.bias, 64**-0.5)
    assert spread(layer.attention.value_proj.weight, (6 / 128) ** 0.5)
    assert layer.attention.sampling_offsets.weight.abs().max() == 0
    assert layer.attention.attention_weights.weight.abs().max() == 0
    assert spread(decoder.input_proj[0][0].weight, (6 / (20 + 64)) ** 0.5)
    assert decoder.input_proj[0][0].bias.abs().max() == 0
    assert spread(decoder.lateral[0].weight, (3 / 8) ** 0.5)
    assert spread(decoder.output[0].weight, (3 / (64 * 9)) ** 0.5)
    assert spread(decoder.mask_features.weight, (3 / 64) ** 0.5)
    assert 0.8 < decoder.level_embed.std() < 1.2
