from dataclasses import replace

import pytest

import m2f.model.backbones.published
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.start.backbone_start import settle_backbone
from m2f.data_pipeline.config import DataConfig, DatasetConfig, MixtureItem
from m2f.model.backbones.published import has_frozen_norms, published_problem
from m2f.model.config import ModelConfig, SwinBackboneConfig, TimmBackboneConfig, ViTAdapterBackboneConfig
from m2f.model.errors import ConfigError
from m2f.trainer.config import TrainingConfig

NO_HUB = "https://hub does not answer"
CONFIG = RunConfig(
    name="run",
    datasets={"train": DatasetConfig(shards="shards")},
    data=DataConfig(train=(MixtureItem(dataset="train"),)),
    training=TrainingConfig(max_steps=1),
)


def start(backbone, stored=None, problem=None, frozen=True, weights=None, freeze=()):
    config = replace(CONFIG, model=ModelConfig(backbone=backbone, weights=weights, freeze=freeze))
    return settle_backbone(config, stored, lambda name: problem, lambda config: frozen)


@pytest.mark.parametrize(
    ("backbone", "options", "pretrained", "warning"),
    [
        (TimmBackboneConfig(), {}, True, ()),
        (TimmBackboneConfig(), {"problem": NO_HUB}, False, (NO_HUB, "norm to group", "HF_ENDPOINT", "package:")),
        (TimmBackboneConfig(), {"problem": NO_HUB, "frozen": False}, False, (NO_HUB, "HF_ENDPOINT")),
        (TimmBackboneConfig(norm="sync_batch"), {"problem": NO_HUB}, False, (NO_HUB,)),
        (TimmBackboneConfig(norm="group"), {"problem": NO_HUB}, False, ()),
        (TimmBackboneConfig(options={"channels": [8]}), {}, False, ("model.backbone.options", "norm to group")),
        (TimmBackboneConfig(pretrained=True), {}, True, ()),
        (TimmBackboneConfig(pretrained=True, options={"cache_dir": "timm"}), {"problem": NO_HUB}, True, ()),
        (TimmBackboneConfig(pretrained=True), {"weights": "model.pth", "problem": NO_HUB}, True, ()),
        (TimmBackboneConfig(pretrained=False), {}, False, ("pretrained is false", "norm to group")),
        (TimmBackboneConfig(pretrained=False), {"frozen": False}, False, ()),
        (TimmBackboneConfig(weights="r50.pth"), {"problem": NO_HUB}, False, ()),
        (TimmBackboneConfig(), {"weights": "model.pth", "problem": NO_HUB}, False, ()),
        (TimmBackboneConfig(), {"stored": False}, False, ()),
        (TimmBackboneConfig(), {"stored": True, "problem": NO_HUB}, True, ()),
        (TimmBackboneConfig(pretrained=True), {"stored": False, "problem": NO_HUB}, True, ()),
        (SwinBackboneConfig(), {}, None, ("random weights", "swin_tiny_patch4_window7_224")),
        (SwinBackboneConfig(pretrained="swin_tiny"), {}, "swin_tiny", ()),
        (ViTAdapterBackboneConfig(), {}, True, ()),
        (ViTAdapterBackboneConfig(pretrained=False), {}, False, ()),
        (TimmBackboneConfig(pretrained=False), {"freeze": ["backbone"]}, False, ("model.freeze is ['backbone'], so",)),
        (
            ViTAdapterBackboneConfig(pretrained=False),
            {"freeze": ["backbone.vit"]},
            False,
            ("stay random", "HF_ENDPOINT"),
        ),
    ],
)
def test_initial_weights_of_the_backbone_and_warnings(backbone, options, pretrained, warning):
    found = start(backbone, **options)
    assert found.config.model.backbone.pretrained == pretrained
    assert (found.warning is None) == (not warning)
    for part in warning:
        assert part in str(found.warning)
    assert ("norm layers stay frozen" in (found.warning or "")) == ("norm to group" in warning)


@pytest.mark.parametrize(
    ("backbone", "setting", "name"),
    [
        (TimmBackboneConfig(pretrained=True), "true", "resnet50"),
        (TimmBackboneConfig(pretrained=True, norm="group"), "true", "resnet50"),
        (SwinBackboneConfig(pretrained="swin_tiny"), "swin_tiny", "swin_tiny"),
        (ViTAdapterBackboneConfig(name="vit"), "true", "vit"),
    ],
)
def test_a_new_run_is_refused_if_the_weights_that_it_requires_are_not_available(backbone, setting, name):
    message = f"pretrained is {setting}, but timm's weights of {name} are not available: {NO_HUB}. .*weights to a file"
    with pytest.raises(ConfigError, match=f"{message}.*HF_ENDPOINT.*HF_HUB_OFFLINE=1"):
        start(backbone, problem=NO_HUB)
    assert start(backbone).config.model.backbone == backbone


@pytest.mark.parametrize(
    ("backbone", "problem", "reason"),
    [
        (TimmBackboneConfig(), NO_HUB, NO_HUB),
        (TimmBackboneConfig(norm="group"), None, "other norms than model.backbone.norm: group"),
        (TimmBackboneConfig(options={"channels": [8]}), None, "model.backbone.options"),
        (SwinBackboneConfig(), None, "the recipe sets no weights"),
    ],
)
def test_a_new_run_must_not_freeze_a_backbone_that_starts_from_random_weights(backbone, problem, reason):
    with pytest.raises(ConfigError, match=r"model\.freeze is \['backbone'\], but the backbone .*random") as raised:
        start(backbone, problem=problem, freeze=("backbone",))
    assert reason in str(raised.value)
    assert "remove the backbone from model.freeze, or start from trained weights" in str(raised.value)
    for given in ({"stored": False}, {"weights": "model.pth"}, {"freeze": ("pixel_decoder",)}):
        assert start(backbone, **({"problem": problem, "freeze": ("backbone",)} | given)).config.model.freeze


def test_has_frozen_norms_detects_frozen_batch_norms():
    assert has_frozen_norms(TimmBackboneConfig(name="resnet10t"))
    assert not has_frozen_norms(TimmBackboneConfig(name="resnet10t", norm="group"))
    assert not has_frozen_norms(TimmBackboneConfig(name="convnext_atto"))


def test_published_problem_asks_the_hub_and_names_known_weights(monkeypatch):
    asked = []
    monkeypatch.setattr(m2f.model.backbones.published, "unavailable_reason", lambda repo: asked.append(repo) or NO_HUB)
    assert published_problem("resnet50.tv_in1k") == NO_HUB
    assert asked == ["timm/resnet50.tv_in1k"]
    assert published_problem("resnet10t_of_mine") is None
    assert published_problem("resnet200") == "timm has no published weights for resnet200"
    with pytest.raises(ConfigError, match=r"the backbone is 'resnet50\.of_mine', whose tag .*known: .*a1_in1k"):
        published_problem("resnet50.of_mine")
