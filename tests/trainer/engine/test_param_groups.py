import json

import pytest
import torch
from torch import nn

from m2f.model.backbones.build import build_backbone
from m2f.model.config import ModelConfig, SwinBackboneConfig, TimmBackboneConfig, ViTAdapterBackboneConfig
from m2f.model.mask2former import build_model
from m2f.model.weights.load import to_own_names
from m2f.trainer.config import OptimizerConfig
from m2f.trainer.engine.param_groups import build_param_groups
from m2f.trainer.errors import TrainingError

SMALL_ADAPTER = ViTAdapterBackboneConfig(
    name="vit_small_patch16_dinov3_qkvb", options={"embed_dim": 32, "depth": 4, "num_heads": 2}
)


def settings_by_name(model):
    groups = build_param_groups(model, OptimizerConfig())
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize(
    ("golden", "backbone"),
    [("r50_coco_panoptic", TimmBackboneConfig()), ("swin_tiny_coco_panoptic", SwinBackboneConfig())],
)
def test_every_parameter_has_the_official_settings(goldens, golden, backbone):
    official = json.loads((goldens / f"g_param_groups_{golden}.json").read_text())
    entries = json.loads((goldens / f"state_dict_{golden}.json").read_text())["entries"]
    rows = {entry["key"]: entry["shape"][0] for entry in entries if entry["shape"]}
    choices = sorted({(lr, decay) for _, lr, decay in official["groups"]})
    # Each official tensor is replaced by a vector filled with its group's index, so that renaming, which joins and
    # splits projections, preserves the group.
    encoded = {name: torch.full((rows[name],), choices.index((lr, wd))) for name, lr, wd in official["groups"]}
    expected = to_own_names(encoded, "official")

    ours = settings_by_name(build_model(ModelConfig(num_classes=133, backbone=backbone), pretrained_backbone=False))
    assert set(ours) == set(expected)
    for name, codes in expected.items():
        assert codes.unique().numel() == 1, name
        assert ours[name] == pytest.approx(choices[codes[0]], rel=1e-15), name


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1), "norm": nn.GroupNorm(1, 1)})
        self.backbone.register_parameter("relative_position_bias_table", nn.Parameter(torch.zeros(1)))
        self.query = nn.Embedding(1, 1)
        self.linear = nn.Linear(1, 1)
        self.tied = self.linear
        self.frozen = nn.Linear(1, 1).requires_grad_(False)


def test_groups_are_merged_and_leave_out_frozen_parameters():
    groups = build_param_groups(Toy(), OptimizerConfig(lr=1.0, weight_decay=0.5, backbone_lr_multiplier=0.1))
    assert [(g["name"], len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [
        ("backbone", 2, 0.1, 0.5),
        ("backbone_no_decay", 3, 0.1, 0.0),
        ("head", 2, 1.0, 0.5),
        ("head_no_decay", 1, 1.0, 0.0),
    ]


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(TrainingError, match="no trainable parameter"):
        build_param_groups(nn.Linear(1, 1).requires_grad_(False), OptimizerConfig())


def rates(backbone):
    model = nn.Module()
    model.backbone = build_backbone(backbone, pretrained=False)
    groups = build_param_groups(model, OptimizerConfig(lr=1.0, backbone_lr_multiplier=0.5, layer_decay=0.1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p].removeprefix("backbone."): g["lr"] for g in groups for p in g["params"]}


def test_learning_rates_decay_per_block_of_a_swin():
    found = rates(SwinBackboneConfig(embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 1, 1, 1)))
    expected = {
        "patch_embed.proj.weight": 5e-7,  # five blocks above it
        "layers.0.blocks.0.mlp.fc1.weight": 5e-6,
        "layers.0.downsample.reduction.weight": 5e-6,
        "norm0.weight": 5e-2,  # output norms are adjacent to the head
        "layers.1.blocks.0.mlp.fc1.weight": 5e-5,
        "layers.1.blocks.1.mlp.fc1.weight": 5e-4,
        "layers.3.blocks.0.mlp.fc1.weight": 5e-2,
        "norm3.weight": 5e-2,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "options", "blocks"),
    [
        ("resnet10t", {"channels": [8, 16, 16, 32]}, 4),
        ("convnext_atto", {"depths": [1, 1, 2, 1], "dims": [8, 16, 16, 32]}, 5),
    ],
)
def test_blocks_are_found_in_convolutional_backbones(name, options, blocks):
    found = rates(TimmBackboneConfig(name=name, norm="native", options=options))
    assert sorted(set(found.values())) == pytest.approx([0.5 * 0.1**depth for depth in range(blocks + 1, 0, -1)])


def test_an_adapter_is_adjacent_to_the_head_although_torch_lists_its_embedding_first():
    found = rates(SMALL_ADAPTER)
    expected = {
        "vit.embed.cls_token": 5e-6,
        "vit.blocks.0.mlp.fc1.weight": 5e-5,
        "vit.blocks.3.mlp.fc1.weight": 5e-2,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    adapter = {rate for name, rate in found.items() if not name.startswith("vit.")}
    assert adapter == {found["vit.blocks.3.mlp.fc1.weight"]}
    assert "level_embed" in found


def test_a_backbone_without_blocks_cannot_have_layer_decay():
    with pytest.raises(TrainingError, match=r"layer_decay is 0\.9, .*but the backbone has no blocks; set it to 1"):
        build_param_groups(Toy(), OptimizerConfig(layer_decay=0.9))


def test_layer_decay_with_a_frozen_transformer_is_refused_with_the_reason():
    model = nn.Module()
    model.backbone = build_backbone(SMALL_ADAPTER, pretrained=False)
    model.backbone.vit.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"blocks of the backbone are frozen \(model\.freeze\); set it to 1"):
        build_param_groups(model, OptimizerConfig(layer_decay=0.9))


def test_sparing_more_blocks_than_there_are_is_refused():
    model = nn.Module()
    model.backbone = build_backbone(SMALL_ADAPTER, pretrained=False)
    config = OptimizerConfig(layer_decay=0.9, layer_decay_spared=4)
    rates_found = sorted({group["lr"] for group in build_param_groups(model, config)})
    assert rates_found == pytest.approx([1e-5 * 0.9**5, 1e-5])
    with pytest.raises(TrainingError, match="layer_decay_spared is 5, but the backbone has only 4 trained blocks"):
        build_param_groups(model, OptimizerConfig(layer_decay=0.9, layer_decay_spared=5))
