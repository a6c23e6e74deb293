import dataclasses
import json
import pickle
import re

import pytest
import timm
import torch

from m2f.model.backbones.build import build_backbone
from m2f.model.config import (
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    SwinBackboneConfig,
    TimmBackboneConfig,
)
from m2f.model.errors import ConfigError, WeightsError
from m2f.model.mask2former import build_model
from m2f.model.weights.load import load_weights
from m2f.model.weights.names import to_official_names, to_own_names

TINY_RESNET = TimmBackboneConfig(name="resnet50", options={"layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32)})
TINY_SWIN = SwinBackboneConfig(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2), window_size=3)


def small_config(num_classes=5, num_queries=6, num_layers=4):
    return ModelConfig(
        backbone=TimmBackboneConfig(name="resnet10t", options={"channels": (8, 16, 32, 64)}),
        pixel_decoder=MSDeformAttnPixelDecoderConfig(
            conv_dim=32, mask_dim=16, num_layers=1, num_heads=2, feedforward_dim=24
        ),
        transformer_decoder=MaskedTransformerDecoderConfig(
            num_queries=num_queries, num_layers=num_layers, hidden_dim=32, num_heads=2, feedforward_dim=24
        ),
        num_classes=num_classes,
    )


NARROW_RESNET = TimmBackboneConfig(name="resnet50", options={"channels": (8, 16, 24, 32)})


def torchvision_resnet50():
    """Return random weights of a narrow ResNet-50 under torchvision's names, which timm shares."""
    state = timm.create_model("resnet50", channels=(8, 16, 24, 32), num_classes=3).state_dict()
    return {key: torch.rand_like(tensor) for key, tensor in state.items() if "num_batches_tracked" not in key}


def assert_equal_states(module, expected):
    state = module.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


@pytest.fixture
def small():
    torch.manual_seed(0)
    return build_model(small_config())


SWIN_LARGE = SwinBackboneConfig(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=12)


@pytest.mark.parametrize(
    ("name", "backbone", "queries"),
    [
        ("r50_coco_panoptic", TimmBackboneConfig(), 100),
        ("r50_coco_instance", TimmBackboneConfig(), 100),
        ("r50_ade20k_semantic", TimmBackboneConfig(), 100),
        ("swin_tiny_coco_panoptic", SwinBackboneConfig(), 100),
        ("swin_large_coco_panoptic_200q", SWIN_LARGE, 200),
    ],
)
def test_official_checkpoints_load_completely(goldens, name, backbone, queries):
    layout = json.loads((goldens / f"state_dict_{name}.json").read_text())
    with torch.device("meta"):  # names and shapes without memory
        official = {entry["key"]: torch.empty(entry["shape"]) for entry in layout["entries"]}
        decoder = MaskedTransformerDecoderConfig(num_queries=queries)
        classes = len(official["criterion.empty_weight"]) - 1
        config = ModelConfig(backbone=backbone, transformer_decoder=decoder, num_classes=classes)
        model = build_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == layout["num_parameters"]
    report = load_weights(model, official)
    assert report.layout == "official"
    assert report.complete, report
    assert not report.unexpected, report
    assert not report.resized
    assert len(report.loaded) == len(model.state_dict())
    not_weights = {key for key in official if key.startswith("criterion.") or key.endswith("relative_position_index")}
    exported = to_official_names(model.state_dict())
    assert set(exported) == set(official) - not_weights
    assert all(exported[key].shape == official[key].shape for key in exported)


@pytest.mark.parametrize("backbone", [TINY_RESNET, TINY_SWIN], ids=["resnet", "swin"])
def test_renaming_to_official_names_and_back_changes_nothing(backbone):
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(small_config(num_layers=5), backbone=backbone))
    official = to_official_names(model.state_dict())
    decoder, dim = model.transformer_decoder, 32
    packed = official["sem_seg_head.predictor.transformer_cross_attention_layers.4.multihead_attn.in_proj_weight"]
    assert torch.equal(decoder.layers[4].cross_query.weight, packed[:dim])  # layer 4 is the second of level 1
    assert torch.equal(decoder.memories[1].key.weight[dim:], packed[dim : 2 * dim])
    assert torch.equal(decoder.memories[1].value.weight[dim:], packed[2 * dim :])
    other = build_model(dataclasses.replace(small_config(num_layers=5), backbone=backbone))
    assert load_weights(other, official).complete
    assert_equal_states(other, model.state_dict())


def test_models_without_official_counterpart_are_not_exported(small):
    with pytest.raises(WeightsError, match=r"weights have no counterpart in the official code, for example backbone"):
        to_official_names(small.state_dict())  # its stem has three convolutions


@pytest.mark.parametrize(("source", "target"), [(3, 4), (4, 3)])
def test_swin_position_biases_are_resized_to_another_window(source, target):
    def model(window):
        backbone = dataclasses.replace(TINY_SWIN, window_size=window)
        return build_model(dataclasses.replace(small_config(), backbone=backbone))

    file, resized = model(source), model(target)
    state = file.state_dict()
    key = "backbone.layers.0.blocks.0.attn.relative_position_bias_table"
    # Bicubic interpolation reproduces a plane, except at the borders.
    side = torch.arange(2.0 * source - 1) - (source - 1)
    state[key] = (side[:, None] + 10 * side).reshape(-1, 1) / (2 * source - 1)
    report = load_weights(resized, state)
    assert report.complete
    assert len(report.resized) == sum(TINY_SWIN.depths)
    loaded = resized.state_dict()[key].view(2 * target - 1, 2 * target - 1)
    wanted = torch.arange(2.0 * target - 1) - (target - 1)
    inside = slice(target - 1, target)
    expected = ((wanted[:, None] + 10 * wanted) / (2 * target - 1))[inside, inside]
    torch.testing.assert_close(loaded[inside, inside], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded, -loaded.flip(0, 1), atol=1e-5, rtol=0)


def test_detectron_resnets_load_into_the_backbone(goldens, tmp_path):
    keymap = json.loads((goldens / "i_keymap_torchvision_resnet50.json").read_text())["map"]
    torchvision = torchvision_resnet50()
    assert {key for key in keymap if "num_batches_tracked" not in key} == set(torchvision)
    detectron = {keymap[key]: tensor.numpy() for key, tensor in torchvision.items()}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": detectron, "__author__": "torchvision", "matching_heuristics": True}))
    direct = build_backbone(dataclasses.replace(NARROW_RESNET, weights=str(path)))
    model = build_model(dataclasses.replace(small_config(), backbone=NARROW_RESNET))
    report = load_weights(model, path)
    assert report.layout == "backbone"
    assert not report.unexpected, report
    assert not any(key.startswith("backbone.") for key in report.missing)
    for backbone in (direct, model.backbone):
        assert_equal_states(backbone.body, {k: v for k, v in torchvision.items() if not k.startswith("fc.")})


def test_torchvision_and_timm_weights_load_into_the_backbone():
    torchvision = torchvision_resnet50()
    model = build_model(dataclasses.replace(small_config(), backbone=NARROW_RESNET))
    report = load_weights(model, torchvision)
    assert not report.unexpected
    assert not any(key.startswith("backbone.") for key in report.missing)
    convnext = timm.create_model("convnext_atto", num_classes=3).state_dict()
    model = build_model(dataclasses.replace(small_config(), backbone=TimmBackboneConfig(name="convnext_atto")))
    report = load_weights(model, convnext)
    assert not any(key.startswith("backbone.") for key in report.missing), report


def test_timm_names_of_swin_load_into_the_backbone():
    model = build_model(dataclasses.replace(small_config(), backbone=TINY_SWIN))
    microsoft = {key: torch.rand_like(tensor) for key, tensor in model.backbone.state_dict().items()}
    timm_names = {
        re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key): tensor
        for key, tensor in microsoft.items()
    }
    for state in (microsoft, timm_names):
        report = load_weights(build_into := build_model(dataclasses.replace(small_config(), backbone=TINY_SWIN)), state)
        assert not report.unexpected, report
        assert not any(key.startswith("backbone.") for key in report.missing)
        assert_equal_states(build_into.backbone, microsoft)


def test_weights_of_msra_are_refused(small):
    with pytest.raises(WeightsError, match="strides in the first convolution"):
        load_weights(small, {"conv1_w": torch.zeros(1), "res2_0_branch2a_w": torch.zeros(1)})


def test_a_url_of_a_backbone_is_refused_outside_a_training_run():
    with pytest.raises(ConfigError, match=r"backbone\.weights is s3://b/r50\.pkl, a URL, .*copy it to a local path"):
        build_backbone(TimmBackboneConfig(weights="s3://b/r50.pkl"))


def test_names_of_old_official_files_are_recognised():
    old = {
        "sem_seg_head.predictor.static_query.weight": torch.ones(1),
        "sem_seg_head.mask_features.weight": torch.ones(2),
        "sem_seg_head.input_proj.0.0.weight": torch.ones(3),
    }
    assert {key: len(value) for key, value in to_own_names(old, "official").items()} == {
        "transformer_decoder.query_feat.weight": 1,
        "pixel_decoder.mask_features.weight": 2,
        "pixel_decoder.input_proj.0.0.weight": 3,
    }


def test_class_and_query_weights_of_another_size_are_skipped_and_reported(small):
    other = build_model(small_config(num_classes=9, num_queries=8))
    before = other.transformer_decoder.class_embed.weight.clone()
    report = load_weights(other, small.state_dict())
    assert not report.complete
    assert report.skipped == (
        "transformer_decoder.query_feat.weight (file (6, 32), model (8, 32))",
        "transformer_decoder.query_embed.weight (file (6, 32), model (8, 32))",
        "transformer_decoder.class_embed.weight (file (6, 32), model (10, 32))",
        "transformer_decoder.class_embed.bias (file (6,), model (10,))",
    )
    assert torch.equal(other.transformer_decoder.class_embed.weight, before)
    assert torch.equal(other.transformer_decoder.level_embed.weight, small.transformer_decoder.level_embed.weight)
    assert "4 skipped: transformer_decoder.query_feat.weight" in str(report)


def test_missing_and_unexpected_weights_are_reported(small):
    state = dict(small.state_dict())
    state.pop("transformer_decoder.norm.bias")
    state["extra"] = torch.zeros(())
    report = load_weights(build_model(small_config()), state)
    assert report.missing == ("transformer_decoder.norm.bias",)
    assert report.unexpected == ("extra",)
    assert str(report).splitlines()[1:] == ["1 missing: transformer_decoder.norm.bias", "1 unexpected: extra"]


def test_enforced_projections_before_the_decoder_are_refused(small):
    names = [f"sem_seg_head.predictor.input_proj.{level}.{kind}" for level in range(3) for kind in ("weight", "bias")]
    model = build_model(dataclasses.replace(small_config(), backbone=TINY_SWIN))
    official = to_official_names(model.state_dict())
    with pytest.raises(WeightsError, match=r"1x1 projections .*memories\.0\.input_proj\.weight and 5 more; .*ENFORCE"):
        load_weights(model, official | {name: torch.zeros(32) for name in names})


def test_weights_of_a_deeper_backbone_are_refused():
    deep = dataclasses.replace(small_config(), backbone=dataclasses.replace(TINY_SWIN, depths=(1, 2, 3, 1)))
    state = build_model(deep).state_dict()
    model = build_model(dataclasses.replace(small_config(), backbone=TINY_SWIN))
    for weights in (state, to_official_names(state)):
        with pytest.raises(WeightsError, match=r"lacks \d+ of its weights.*2\.blocks\.1\..*; set model\.backbone"):
            load_weights(model, weights)


def test_weights_with_less_than_half_of_the_backbone_are_refused():
    deep = dataclasses.replace(TINY_RESNET, options={"layers": (1, 2, 20, 1), "channels": (8, 16, 24, 32)})
    model = build_model(dataclasses.replace(small_config(), backbone=TINY_RESNET))
    other = build_model(dataclasses.replace(small_config(), backbone=deep))
    with pytest.raises(WeightsError, match=r"has only \d+ of the \d+ weights of the recipe's backbone"):
        load_weights(other, to_official_names(model.state_dict()))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "regnety_002"])
def test_norms_with_a_fused_activation_load_into_replaced_norms_and_back(name):
    def model(norm):
        return build_model(dataclasses.replace(small_config(), backbone=TimmBackboneConfig(name=name, norm=norm)))

    published = timm.create_model(name, num_classes=3).state_dict()
    state = {key: torch.rand_like(value) if value.is_floating_point() else value for key, value in published.items()}
    native, frozen, again = model("native"), model("frozen_batch"), model("native")
    for target, source in ((native, state), (frozen, state), (again, frozen.state_dict())):
        report = load_weights(target, source)
        assert not any(key.startswith("backbone.") for key in report.missing), report
    expected = {key: value for key, value in native.backbone.state_dict().items() if "num_batches" not in key}
    assert all(torch.equal(again.backbone.state_dict()[key], value) for key, value in expected.items())
    assert load_weights(model("group"), native.state_dict()).complete


def test_another_architecture_is_refused_and_nothing_is_loaded(small):
    other = build_model(small_config(num_layers=5))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(WeightsError, match=r"another architecture .*memories\.1\.key\.weight"):
        load_weights(other, small.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_another_width_is_refused_also_if_the_classes_are_matched(small):
    config = small_config()
    wide = dataclasses.replace(config.transformer_decoder, hidden_dim=64)
    other = build_model(dataclasses.replace(config, transformer_decoder=wide))
    with pytest.raises(WeightsError, match=r"another architecture .*level_embed.*\(3, 32\), model \(3, 64\)"):
        load_weights(other, small.state_dict(), class_rows=[0, 1, None, 3, 4])


def test_weights_of_another_model_are_refused(small):
    with pytest.raises(WeightsError, match="no weights of this model; its first names are conv1, fc"):
        load_weights(small, {"conv1": torch.zeros(1), "fc": torch.zeros(1)})


def test_a_wrapped_torch_file_is_opened(tmp_path, small):
    path = tmp_path / "model.pth"
    torch.save({"model": small.state_dict(), "iteration": 7}, path)
    assert load_weights(build_model(small_config()), path).complete
