import json
import re
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from m2f.model.backbones.build import build_backbone
from m2f.model.backbones.swin import Block, SwinTransformer, draw_drop_path_scales, relative_position_index, shift_mask
from m2f.model.config import SwinBackboneConfig
from m2f.model.errors import ConfigError

TINY = SwinBackboneConfig(embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=7)
TINY_12 = replace(TINY, depths=(2, 1, 1, 2), window_size=12)
SIZES = {"crop": (128, 128), "not square": (64, 160), "odd": (101, 75)}


def randomised_swin(config=TINY, **changes):
    """Return a Swin with random parameters, so that biases, norms and position biases affect the output."""
    torch.manual_seed(0)
    model = SwinTransformer(replace(config, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def huggingface_swin_name(key):
    """Return a weight's name in the SwinBackbone of transformers 5; `{}` stands for q, k or v, which are separate."""
    for pattern, replacement in (
        (r"^norm(\d)\.", lambda match: f"hidden_states_norms.stage{int(match[1]) + 1}."),
        (r"^patch_embed\.proj\.", "swin.embeddings.patch_embeddings.projection."),
        (r"^patch_embed\.norm\.", "swin.embeddings.norm."),
        (r"^layers\.", "swin.encoder.layers."),
        (r"\.attn\.relative_position_bias_table", ".attention.relative_position_bias.relative_position_bias_table"),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.attn\.qkv\.", ".attention.{}_proj."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
    ):
        key = re.sub(pattern, replacement, key)
    return key


def huggingface_swin(ours, config):
    """Return the same network, with the same weights, in transformers."""
    theirs = transformers.SwinBackbone(
        transformers.SwinConfig(
            embed_dim=config.embed_dim,
            depths=list(config.depths),
            num_heads=list(config.num_heads),
            window_size=config.window_size,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
    ).eval()
    state = {}
    for key, tensor in ours.state_dict().items():
        name = huggingface_swin_name(key)
        parts = tensor.chunk(3) if ".qkv." in key else (tensor,)
        state |= {name.format(letter): part for letter, part in zip("qkv", parts, strict=False)}
    result = theirs.load_state_dict(state, strict=False)
    assert set(result.missing_keys) <= {"swin.layernorm.weight", "swin.layernorm.bias"}
    assert result.unexpected_keys == []
    return theirs


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("config", [TINY, TINY_12], ids=["window 7", "window 12"])
def test_maps_and_gradients_equal_those_of_transformers(config, size):
    ours = randomised_swin(config).double().eval()
    theirs = huggingface_swin(ours, config).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    expected, actual = theirs(images).feature_maps, ours(images)
    for theirs_map, our_map in zip(expected, actual, strict=True):
        torch.testing.assert_close(our_map, theirs_map, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(sum(m.square().sum() for m in maps), images)[0] for maps in (expected, actual)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8 * gradients[0].abs().max().item())


@pytest.mark.soak
@pytest.mark.parametrize("window", [7, 12])
def test_swin_tiny_equals_transformers_at_full_depth_and_512_pixels(window):
    config = SwinBackboneConfig(window_size=window)
    torch.manual_seed(0)
    ours = SwinTransformer(config).double().eval()
    theirs = huggingface_swin(ours, config).double()
    images = torch.randn(1, 3, 512, 509, dtype=torch.float64)
    with torch.no_grad():
        for theirs_map, our_map in zip(theirs(images).feature_maps, ours(images), strict=True):
            torch.testing.assert_close(our_map, theirs_map, rtol=1e-9, atol=1e-9)


def test_maps_equal_timm_where_windows_fit():
    source = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=16, num_heads=(1, 2, 4, 8), num_classes=0, always_partition=True
    ).eval()
    config = replace(TINY, depths=(2, 2, 6, 2))
    ours = randomised_swin(config).eval()
    downsample = {key: re.sub(r"(\d)(?=\.downsample)", lambda m: str(int(m[1]) + 1), key) for key in ours.state_dict()}
    source.load_state_dict({downsample[k]: t for k, t in ours.state_dict().items() if not k.startswith("norm")}, False)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = source.forward_intermediates(images, intermediates_only=True)
        for index, (theirs, actual) in enumerate(zip(expected, ours(images), strict=True)):
            norm = ours.get_submodule(f"norm{index}")
            normalised = norm(theirs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            torch.testing.assert_close(actual, normalised, rtol=1e-4, atol=1e-4)


def attention_pixel_by_pixel(block, tokens):
    """Compute shifted window attention without rolling, one pair of pixels of the padded map at a time.

    Windows start at shift, shift + window, ...; the remainders at both ends form separate windows. With at least two
    windows per side, pixels that only rolling brings together lie in different windows.
    """
    window, shift, heads = block.window, block.shift, block.attn.heads
    height, width, channels = tokens.shape
    padded = F.pad(tokens, (0, 0, 0, -width % window, 0, -height % window))
    pixels = [(row, column) for row in range(padded.shape[0]) for column in range(padded.shape[1])]
    query, key, value = block.attn.qkv(padded).flatten(0, 1).unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
    logits = torch.full((heads, len(pixels), len(pixels)), -torch.inf, dtype=tokens.dtype)
    side = 2 * window - 1
    for i, (row, column) in enumerate(pixels):
        for j, (other_row, other_column) in enumerate(pixels):
            same_row = (row - shift) // window == (other_row - shift) // window
            if same_row and (column - shift) // window == (other_column - shift) // window:
                index = (row - other_row + window - 1) * side + column - other_column + window - 1
                logits[:, i, j] = (query[:, i] * key[:, j]).sum(-1) / (channels // heads) ** 0.5
                logits[:, i, j] += block.attn.relative_position_bias_table[index]
    attended = (logits.softmax(-1) @ value).permute(1, 0, 2).flatten(1)
    return block.attn.proj(attended).view(padded.shape)[:height, :width]


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 6)])
def test_attention_equals_a_pixel_by_pixel_reference(size, shift):
    torch.manual_seed(0)
    block = Block(8, 2, 4, shift=shift).double()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    tokens = torch.randn(2, *size, 8, dtype=torch.float64)
    mask = shift_mask(*(side + -side % 4 for side in size), 4, shift, tokens)
    with torch.no_grad():
        actual = block._attend(tokens, mask if shift else None)
        expected = torch.stack([attention_pixel_by_pixel(block, image) for image in tokens])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("golden", ["swin_tiny_coco_panoptic", "swin_large_coco_panoptic_200q"])
def test_names_and_shapes_are_the_official_ones(goldens, golden):
    sizes = {
        "swin_tiny_coco_panoptic": SwinBackboneConfig(),
        "swin_large_coco_panoptic_200q": SwinBackboneConfig(
            embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=12
        ),
    }
    with torch.device("meta"):
        model = SwinTransformer(sizes[golden])
    entries = json.loads((goldens / f"state_dict_{golden}.json").read_text())["entries"]
    official = {e["key"]: (tuple(e["shape"]), e["kind"]) for e in entries if e["key"].startswith("backbone.")}
    ours = {f"backbone.{key}": (tuple(p.shape), "parameter") for key, p in model.named_parameters()}
    ours |= {f"backbone.{key}": (tuple(b.shape), "buffer") for key, b in model.named_buffers()}
    assert ours == official
    assert not any("relative_position_index" in key for key in model.state_dict())


def test_relative_positions_are_numbered_as_published():
    index = relative_position_index(2)
    assert index.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_swin_gives_every_parameter_a_gradient_and_rounds_sizes_up(size):
    model = randomised_swin().train()
    maps = model(torch.randn(2, 3, *size))
    expected = [(2, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(model.channels, (4, 8, 16, 32), strict=True)]
    assert [tuple(m.shape) for m in maps] == expected
    sum(m.square().sum() for m in maps).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_checkpointing_changes_no_gradient_even_with_drop_path():
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        model = randomised_swin(drop_path=0.5, checkpointing=checkpointing).train()
        torch.manual_seed(1)
        sum(m.square().sum() for m in model(images)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


def test_drop_path_rate_grows_linearly_with_depth_and_preserves_the_mean():
    torch.manual_seed(0)
    scales = draw_drop_path_scales(0.4, 5, torch.zeros(20000, 1))
    assert scales.shape == (5, 2, 20000)
    skipped = (scales == 0).double().mean((1, 2))
    torch.testing.assert_close(skipped, torch.tensor([0, 0.1, 0.2, 0.3, 0.4], dtype=torch.float64), rtol=0, atol=0.01)
    torch.testing.assert_close(scales.mean((1, 2)), torch.ones(5), rtol=0, atol=0.02)
    assert (scales[:, 0] != scales[:, 1]).any(1).tolist() == [False, True, True, True, True]


def test_drop_path_acts_in_training_only():
    images = torch.randn(2, 3, 64, 64)
    model = randomised_swin(drop_path=0.9)
    with torch.no_grad():
        evaluated = [model.eval()(images)[3] for _ in range(2)]
        trained = [model.train()(images)[3] for _ in range(2)]
    assert torch.equal(*evaluated)
    assert not torch.equal(*trained)


@pytest.mark.parametrize("mode", ["autocast", "pure"])
def test_swin_trains_in_bfloat16(mode):
    model, images = randomised_swin(drop_path=0.2).train(), torch.randn(2, 3, 96, 64)
    if mode == "pure":
        model, images = model.bfloat16(), images.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        maps = model(images)
    sum(m.float().square().mean() for m in maps).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    reference = randomised_swin(drop_path=0.2).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        for low, full in zip(model.eval()(images), reference(images.float()), strict=True):
            assert (low.float() - full).abs().mean() < 0.05 * full.abs().mean()


def files_of_swin(model):
    """Return the same weights in the layouts of four publishers."""
    own = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    classifier = {key: t for key, t in own.items() if not re.match(r"norm\d", key)}
    classifier |= {"norm.weight": torch.ones(128), "head.weight": torch.zeros(5, 128), "head.bias": torch.zeros(5)}
    index = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64)}
    timms = {re.sub(r"(\d)(?=\.downsample)", lambda m: str(int(m[1]) + 1), key): t for key, t in classifier.items()}
    whole = {f"backbone.{key}": t for key, t in own.items()} | {"sem_seg_head.x": torch.zeros(1)}
    return {"authors": {"model": classifier | index}, "timm": timms, "official": {"model": whole}, "own": own}


@pytest.mark.parametrize("publisher", ["authors", "timm", "official", "own"])
def test_weights_of_all_publishers_load(tmp_path, publisher):
    source = randomised_swin()
    content = files_of_swin(source)[publisher]
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    loaded = build_backbone(replace(TINY, weights=str(path)))
    assert isinstance(loaded, SwinTransformer)
    keeps_output_norms = publisher in {"official", "own"}
    for key, tensor in source.state_dict().items():
        if keeps_output_norms or not re.match(r"norm\d", key):
            assert torch.equal(loaded.state_dict()[key], tensor), key


def test_pretrained_weights_come_from_timm(monkeypatch):
    source = randomised_swin()
    stored = torch.nn.Module()
    monkeypatch.setattr(stored, "state_dict", lambda: files_of_swin(source)["timm"])
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: stored if name == "mine" else 1 / 0)
    loaded = build_backbone(replace(TINY, pretrained="mine"))
    assert torch.equal(loaded.layers[2].downsample.reduction.weight, source.layers[2].downsample.reduction.weight)
    with pytest.raises(ConfigError, match=r"model\.backbone\.pretrained is 'other'.*set model\.backbone\.weights"):
        build_backbone(replace(TINY, pretrained="other"))
    assert build_backbone(replace(TINY, pretrained="other"), pretrained=False).channels == (16, 32, 64, 128)


def test_error_for_weights_of_another_swin_lists_the_differences(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(randomised_swin().state_dict(), path)
    with pytest.raises(ConfigError, match=r"window_size 12 .*position_bias_table has shape \(169, 1\), expected"):
        build_backbone(replace(TINY, window_size=12, weights=str(path)))
    with pytest.raises(ConfigError, match=r"layers\.0\.blocks\.2\.norm1\.weight is missing"):
        build_backbone(replace(TINY, depths=(3, 2, 2, 2), weights=str(path)))
    with pytest.raises(ConfigError, match=r"model\.backbone\.weights.*nowhere"):
        build_backbone(replace(TINY, weights="/nowhere.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": (3, 2, 4, 8)}, "stage 0 has 16 channels .* not a multiple of 3"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"window_size": 0}, "window_size is 0"),
        ({"depths": (2, 0, 2, 2)}, r"depths is \[2, 0, 2, 2\]; each must be at least 1"),
        ({"pretrained": "a", "weights": "b"}, "keep one"),
    ],
)
def test_invalid_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)
