import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from m2f.model.backbones.batch_norms import FrozenBatchNorm2d
from m2f.model.backbones.build import build_backbone
from m2f.model.backbones.timm_backbone import PyramidTransformer
from m2f.model.config import TimmBackboneConfig, ViTAdapterBackboneConfig
from m2f.model.errors import ConfigError

TINY = {"channels": (8, 16, 32, 64)}
CONVOLUTIONAL = {
    "resnet10t": TINY,
    "convnext_atto": {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)},
    "efficientnet_lite0": {},
    "regnetx_002": {},
    "mobilenetv3_small_050": {},
}


def randomised_timm(name, **options):
    """Return a timm classifier whose BatchNorms have random statistics and parameters."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


TRANSFORMER = {"embed_dim": 32, "depth": 2, "num_heads": 2}
FAMILIES = {
    "resnet50": {"layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32)},
    "convnext_atto": {"dims": (8, 16, 24, 32), "depths": (1, 2, 1, 1)},
    "convnextv2_atto": {"dims": (8, 16, 24, 32), "depths": (1, 2, 1, 1)},
    "swinv2_tiny_window8_256": {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)},
    "hiera_tiny_224": {"embed_dim": 16, "stages": (1, 2, 2, 1)},
    "hiera_small_abswin_256": {"embed_dim": 16, "stages": (1, 2, 2, 1)},
    "sam2_hiera_tiny": {"embed_dim": 16, "stages": (1, 2, 2, 1), "global_att_blocks": (4,)},
    "mambaout_femto": {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)},  # its maps are channels-last
    "eva02_tiny_patch14_336": TRANSFORMER,
    "vit_small_patch14_dinov2": TRANSFORMER,
    "vit_small_patch14_reg4_dinov2": TRANSFORMER,
    "vit_small_patch16_dinov3": TRANSFORMER,
}
SIZES = {"crop": (128, 128), "not square": (64, 160), "odd": (101, 75)}


def small_backbone(name, **settings):
    torch.manual_seed(0)
    return build_backbone(TimmBackboneConfig(name=name, options=FAMILIES[name], **settings))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_accepts_every_image_size(name, size):
    backbone = small_backbone(name).train()
    maps = backbone(torch.randn(2, 3, *size))
    sizes = [tuple(-(-side // stride) for side in size) for stride in (4, 8, 16, 32)]
    assert [tuple(f.shape) for f in maps] == [(2, c, *s) for c, s in zip(backbone.channels, sizes, strict=True)]
    sum(features.square().sum() for features in maps).backward()
    assert [key for key, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_recomputes_activations_and_changes_no_gradient(name):
    images = torch.randn(1, 3, 64, 96)
    gradients, kept = [], []
    for checkpointing in (False, True):
        backbone = small_backbone(name, checkpointing=checkpointing).train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):
            total = sum(features.square().sum() for features in backbone(images))
        total.backward()
        kept.append(sum(sizes))
        gradients.append([p.grad for p in backbone.parameters()])
    assert kept[1] < kept[0]
    for full, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, full, rtol=1e-5, atol=1e-5 * full.abs().max().item())


def test_checkpointing_is_refused_with_synchronised_batch_norm():
    with pytest.raises(ConfigError, match=r"checkpointing is true.*'sync_batch' would count every batch twice"):
        small_backbone("resnet50", norm="sync_batch", checkpointing=True)


def test_hiera_equals_timm_built_for_the_same_size():
    for name in ("hiera_tiny_224", "hiera_small_abswin_256"):
        size = (32, 96)
        ours = small_backbone(
            name,
        ).eval()
        theirs = timm.create_model(name, img_size=size, num_classes=0, **FAMILIES[name]).eval()
        state = {key.removeprefix("body."): tensor for key, tensor in ours.state_dict().items()}
        if name == "hiera_tiny_224":
            state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], (8, 24), (56, 56), num_prefix_tokens=0)
        result = theirs.load_state_dict(state, strict=False)
        assert not result.unexpected_keys
        assert all(key.startswith("head.") for key in result.missing_keys)
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = theirs.forward_intermediates(images, intermediates_only=True)
            for actual, reference in zip(ours(images), expected, strict=True):
                torch.testing.assert_close(actual, reference)


def test_swin_v2_equals_timm_and_pads_instead_of_wrapping_windows():
    ours = small_backbone("swinv2_tiny_window8_256").eval()
    theirs = timm.create_model("swinv2_tiny_window8_256", num_classes=0, **FAMILIES["swinv2_tiny_window8_256"]).eval()
    state = {key.removeprefix("body.model."): tensor for key, tensor in ours.state_dict().items()}
    theirs.load_state_dict(state, strict=False)
    images = torch.randn(1, 3, 256, 256)
    images[:, :, 200:] = 0
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, intermediates_only=True)
        for actual, reference in zip(ours(images), expected, strict=True):
            torch.testing.assert_close(actual, reference)
        cropped = ours(images[:, :, :200])
        torch.testing.assert_close(cropped[0], expected[0][:, :, :50])
    assert ours.multiple == 256


def test_plain_transformer_features_feed_the_stride_16_level():
    backbone = small_backbone("vit_small_patch14_reg4_dinov2").eval()
    assert isinstance(backbone.body, PyramidTransformer)
    model = backbone.body.model
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
        features = tokens.unflatten(1, (4, 6)).permute(0, 3, 1, 2)
        torch.testing.assert_close(backbone(images)[2], backbone.body.pyramid.levels[2](features))
    assert model.num_prefix_tokens == 5


def test_transformer_patches_and_positions_from_a_file_are_resampled(tmp_path):
    source = timm.create_model("vit_small_patch14_dinov2", img_size=70, **TRANSFORMER)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    config = TimmBackboneConfig(
        name="vit_small_patch14_dinov2", weights=str(tmp_path / "weights.safetensors"), options=TRANSFORMER
    )
    model = build_backbone(config).body.model
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert tuple(model.patch_embed.proj.weight.shape) == (32, 3, 16, 16)
    flat = torch.ones(1, 3, 16, 16)  # a patch of one colour is the same at both resolutions
    with torch.no_grad():
        coarse, fine = source.patch_embed.proj(flat[..., :14, :14]), model.patch_embed.proj(flat)
    torch.testing.assert_close(fine, coarse, rtol=0.05, atol=0.05)


def test_a_file_of_another_model_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("convnext_atto").state_dict(), path)
    with pytest.raises(ConfigError, match=r"contains only \d+ of the \d+ .* of 'resnet10t'; the file belongs to"):
        build_backbone(TimmBackboneConfig(name="resnet10t", weights=str(path)))


@pytest.mark.parametrize("norm", ["frozen_batch", "sync_batch", "group", "native"])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_four_maps_and_a_gradient_for_every_parameter(name, norm):
    torch.manual_seed(0)
    backbone = build_backbone(TimmBackboneConfig(name=name, norm=norm, options=CONVOLUTIONAL[name]))
    features = backbone(torch.randn(2, 3, 70, 102))
    sizes = [(18, 26), (9, 13), (5, 7), (3, 4)]
    assert [tuple(f.shape) for f in features] == [(2, c, *s) for c, s in zip(backbone.channels, sizes, strict=True)]
    sum(feature.square().sum() for feature in features).backward()
    assert [key for key, p in backbone.named_parameters() if p.grad is None] == []
    batch_norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert (not batch_norms) or norm in {"native", "sync_batch"}


@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_lite0"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file_give_the_features_of_timm_with_frozen_norms(tmp_path, name, suffix):
    source = randomised_timm(name)
    path = tmp_path / f"weights{suffix}"
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(source.state_dict(), path)
    backbone = build_backbone(TimmBackboneConfig(name=name, weights=str(path))).train()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = source.forward_intermediates(images, indices=(-4, -3, -2, -1), intermediates_only=True)
        for actual, reference in zip(backbone(images), expected, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4 * reference.abs().max().item())
    assert not any("running" in key or "bn" in key for key, _ in backbone.named_parameters())


def test_weights_are_not_read_if_a_checkpoint_will_replace_them():
    config = TimmBackboneConfig(name="resnet10t", weights="/nowhere.safetensors", options=TINY)
    assert build_backbone(config, pretrained=False).channels == (8, 16, 32, 64)
    with pytest.raises(ConfigError, match=r"model\.backbone\.weights: .*/nowhere\.safetensors.* no such file"):
        build_backbone(config)


def test_new_frozen_norm_is_the_identity_even_if_timm_starts_at_zero_gain():
    backbone = build_backbone(TimmBackboneConfig(name="resnet10t", options=TINY))
    norms = [module for module in backbone.modules() if isinstance(module, FrozenBatchNorm2d)]
    features = torch.randn(1, norms[-1].weight.numel(), 3, 3)
    torch.testing.assert_close(norms[-1](features), features)
    assert len(norms) > 10


def test_error_for_an_unknown_name_suggests_similar_names():
    with pytest.raises(ConfigError, match=r"'resnet5O', which timm does not have; did you mean .*resnet50"):
        build_backbone(TimmBackboneConfig(name="resnet5O"))
    name = "vit_small_patch16_dinov3_qkv"
    for config in (TimmBackboneConfig(name=name, features="tokens"), ViTAdapterBackboneConfig(name=name)):
        with pytest.raises(ConfigError, match=rf"'{name}', which timm does not have; did you mean .*{name}b"):
            build_backbone(config, pretrained=False)


@pytest.mark.parametrize("name", ["maxvit_pico_rw_256", "mixer_s16_224"])
def test_models_that_are_not_feature_pyramids_are_refused(name):
    with pytest.raises(ConfigError, match=rf"model\.backbone.*{name}.*"):
        build_backbone(TimmBackboneConfig(name=name))


def test_timm_swin_is_refused_in_favour_of_kind_swin():
    with pytest.raises(ConfigError, match=r"'swin_tiny_patch4_window7_224'.*use model\.backbone\.kind swin"):
        build_backbone(TimmBackboneConfig(name="swin_tiny_patch4_window7_224"))


def test_unknown_timm_option_is_named_in_the_error():
    with pytest.raises(ConfigError, match=r"options \{'chanels': \(8,\)\}.*chanels"):
        build_backbone(TimmBackboneConfig(name="resnet10t", options={"chanels": (8,)}))


def test_a_file_with_python_objects_is_not_executed(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"model": _Evil()}, path)
    with pytest.raises(ConfigError, match=r"weights .*evil"):
        build_backbone(TimmBackboneConfig(name="resnet10t", weights=str(path)))


class _Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))
