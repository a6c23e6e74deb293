import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from model.backbones import FrozenBatchNorm2d, build_backbone
from model.config import TimmBackboneConfig
from model.errors import ConfigError

TINY = {"channels": (8, 16, 32, 64)}
CONVOLUTIONAL = {
    "resnet10t": TINY,
    "convnext_atto": {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)},
    "efficientnet_lite0": {},
    "regnetx_002": {},
    "mobilenetv3_small_050": {},
}


def randomised_timm(name, **options):
    """A timm classifier whose BatchNorms have statistics worth freezing."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


@pytest.mark.parametrize("norm", ["frozen_batch", "group", "native"])
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
    assert (not batch_norms) or norm == "native"


@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_lite0"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file_give_timms_own_features_with_frozen_norms(tmp_path, name, suffix):
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


def test_weights_are_not_read_when_a_checkpoint_comes_next():
    config = TimmBackboneConfig(name="resnet10t", weights="/nowhere.safetensors", options=TINY)
    assert build_backbone(config, pretrained=False).channels == (8, 16, 32, 64)
    with pytest.raises(ConfigError, match=r"model\.backbone\.weights is '/nowhere\.safetensors'"):
        build_backbone(config)


def test_frozen_batch_norm_equals_batch_norm_in_eval_mode_and_never_changes():
    source = randomised_timm("resnet10t", **TINY).bn1.double()
    frozen = FrozenBatchNorm2d.from_trained(source).double().train()
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    features = torch.randn(2, source.num_features, 5, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(frozen(features), source(features), rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(norm(features).square().sum(), features)[0] for norm in (frozen, source)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)
    assert list(frozen.parameters()) == []
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    assert frozen(features.detach().bfloat16()).dtype == torch.bfloat16


def test_a_fresh_frozen_norm_is_the_identity_even_where_timm_starts_at_zero_gain():
    backbone = build_backbone(TimmBackboneConfig(name="resnet10t", options=TINY))
    norms = [module for module in backbone.modules() if isinstance(module, FrozenBatchNorm2d)]
    features = torch.randn(1, norms[-1].weight.numel(), 3, 3)
    torch.testing.assert_close(norms[-1](features), features)
    assert len(norms) > 10


def test_an_unknown_name_suggests_close_ones():
    with pytest.raises(ConfigError, match=r"'resnet5O', which timm does not have; did you mean .*resnet50"):
        build_backbone(TimmBackboneConfig(name="resnet5O"))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224"])
def test_models_that_are_not_feature_pyramids_are_refused(name):
    with pytest.raises(ConfigError, match=rf"model\.backbone.*{name}.*"):
        build_backbone(TimmBackboneConfig(name=name))


def test_an_option_that_timm_does_not_know_is_named():
    with pytest.raises(ConfigError, match=r"options \{'chanels': \(8,\)\}.*chanels"):
        build_backbone(TimmBackboneConfig(name="resnet10t", options={"chanels": (8,)}))


def test_a_file_with_python_objects_is_not_executed(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"model": _Evil()}, path)
    with pytest.raises(ConfigError, match="cannot be read as plain tensors"):
        build_backbone(TimmBackboneConfig(name="resnet10t", weights=str(path)))


class _Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))
