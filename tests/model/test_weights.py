import json

import pytest
import torch

from model.config import (
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    TimmBackboneConfig,
)
from model.errors import WeightsError
from model.mask2former import build_model
from model.weight_names import to_own_names
from model.weights import load_weights


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


@pytest.fixture
def small():
    torch.manual_seed(0)
    return build_model(small_config())


@pytest.mark.parametrize("name", ["r50_coco_panoptic", "r50_coco_instance", "r50_ade20k_semantic"])
def test_official_checkpoints_load_completely(goldens, name):
    layout = json.loads((goldens / f"state_dict_{name}.json").read_text())
    official = {entry["key"]: torch.rand(entry["shape"]) for entry in layout["entries"]}
    classes = len(official["criterion.empty_weight"]) - 1
    model = build_model(ModelConfig(num_classes=classes))
    assert sum(parameter.numel() for parameter in model.parameters()) == layout["num_parameters"]
    report = load_weights(model, official)
    assert report.layout == "official"
    assert report.complete, report
    assert not report.unexpected, report
    assert len(report.loaded) == len(model.state_dict())
    packed = official["sem_seg_head.predictor.transformer_cross_attention_layers.4.multihead_attn.in_proj_weight"]
    decoder = model.transformer_decoder  # layer 4 is the second of level 1
    assert torch.equal(decoder.layers[4].cross_query.weight, packed[:256])
    assert torch.equal(decoder.memories[1].key.weight[256:512], packed[256:512])
    assert torch.equal(decoder.memories[1].value.weight[256:512], packed[512:])


def test_names_of_old_official_files_are_understood():
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


def test_another_number_of_classes_and_queries_is_skipped_and_reported(small):
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


def test_another_architecture_is_refused_and_nothing_is_loaded(small):
    other = build_model(small_config(num_layers=5))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(WeightsError, match=r"another architecture .*memories\.1\.key\.weight"):
        load_weights(other, small.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_weights_of_something_else_are_refused(small):
    with pytest.raises(WeightsError, match="no weight of this model; its first names are conv1, fc"):
        load_weights(small, {"conv1": torch.zeros(1), "fc": torch.zeros(1)})


def test_a_wrapped_torch_file_is_opened(tmp_path, small):
    path = tmp_path / "model.pth"
    torch.save({"model": small.state_dict(), "iteration": 7}, path)
    assert load_weights(build_model(small_config()), path).complete
