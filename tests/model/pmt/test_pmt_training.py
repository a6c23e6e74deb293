"""PMT: a frozen backbone does not change, random draws depend on seed and position, evaluation is deterministic."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from m2f.model.analysis.flops.executed import build_shapes
from m2f.model.config import ModelConfig, PmtDecoderConfig, TimmBackboneConfig, UpscalePixelDecoderConfig
from m2f.model.errors import ConfigError
from m2f.model.mask2former import build_model
from m2f.model.pmt.pmt import default_annealing, position_stretches
from m2f.model.segmenter import TrainingContext
from m2f.trainer.config import OptimizerConfig
from m2f.trainer.engine.compile import compile_regions
from m2f.trainer.engine.param_groups import build_param_groups

DINOV3, DINOV2 = "vit_small_patch16_dinov3_qkvb", "vit_small_patch14_reg4_dinov2"
OPTIONS = {"embed_dim": 32, "num_heads": 2, "init_values": 1.0}


def config_of(name: str = DINOV3, freeze: tuple = ("backbone",), depth: int = 4, **decoder) -> ModelConfig:
    options = OPTIONS | {"depth": depth} | ({} if "dinov3" in name else {"img_size": 64})
    return ModelConfig(
        backbone=TimmBackboneConfig(name=name, features="tokens", options=options),
        pixel_decoder=UpscalePixelDecoderConfig(),
        transformer_decoder=PmtDecoderConfig(**{"num_queries": 6, "num_layers": 2} | decoder),
        num_classes=4,
        freeze=freeze,
    )


def model_of(*args, **settings):
    torch.manual_seed(3)
    return build_model(config_of(*args, **settings), pretrained_backbone=False)


def context(positions: list[int], seed: int = 5) -> TrainingContext:
    return TrainingContext(SimpleNamespace(position=torch.tensor(positions)), seed)  # type: ignore[arg-type]


def total(found) -> torch.Tensor:
    """Return a loss to which every prediction contributes."""
    layers = range(len(found.class_logits))
    return sum(found.mask_logits(layer).square().mean() + found.class_logits[layer].square().mean() for layer in layers)


@pytest.mark.parametrize(("power", "expected"), [(1.0, 0.25), (2.0, 0.0625), (0.0, 1.0)])
def test_mask_probability_decays_with_the_annealing_power(power, expected):
    model = model_of(annealing=((0, 20), (20, 40)), annealing_power=power)
    model.set_progress(15, 60)
    assert model.transformer_decoder.probabilities == pytest.approx((expected, 1.0))


@pytest.mark.parametrize("name", [DINOV3, DINOV2])
def test_training_does_not_change_a_frozen_backbone(name):
    model = model_of(name).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    groups = build_param_groups(model, OptimizerConfig(lr=1e-2))
    assert not any("backbone" in group["name"] for group in groups)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert trained == {id(p) for key, p in model.named_parameters() if not key.startswith("backbone.")}
    optimizer = torch.optim.AdamW(groups)
    total(model(torch.randn(2, 3, 48, 64), context([0, 1]))).backward()
    assert all((p.grad is None) == key.startswith("backbone.") for key, p in model.named_parameters())
    optimizer.step()
    for key, tensor in model.state_dict().items():
        is_same = torch.equal(tensor, before[key])
        assert is_same == (key.startswith("backbone.") or "probs" in key), key


def test_frozen_backbone_keeps_no_activations_for_the_backward_pass():
    kept = []
    model = model_of().train()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda tensor: tensor):
        levels, _, _ = model.backbone.levels(torch.randn(1, 3, 64, 64), model.levels)
    assert kept == []
    assert len(levels) == 4
    assert not any(level.requires_grad for level in levels)
    assert all(p.requires_grad for p in model_of(freeze=()).backbone.parameters())


@pytest.mark.parametrize(("size", "trained", "whole"), [("small", 7.7, 29.3), ("base", 30.4, 116.1)])
def test_parameter_counts_equal_those_of_the_authors_models(size, trained, whole):
    config = ModelConfig(
        backbone=TimmBackboneConfig(name=f"vit_{size}_patch16_dinov3_qkvb", features="tokens"),
        pixel_decoder=UpscalePixelDecoderConfig(),
        transformer_decoder=PmtDecoderConfig(),
        num_classes=133,
        freeze=("backbone",),
    )
    model = build_shapes(config)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    assert sum(count for count, _ in counts) / 1e6 == pytest.approx(whole, abs=0.06)
    assert sum(count for count, is_trained in counts if is_trained) / 1e6 == pytest.approx(trained, abs=0.06)
    assert model.levels == (2, 5, 8, 11)


def test_masks_are_annealed_in_the_windows_of_the_authors():
    coco = ((0, 3000), (23651, 38433), (32520, 47302), (41389, 56171), (50258, 65040), (59128, 73910))
    assert default_annealing(6, 88692) == coco
    ade20k = ((0, 3000), (5384, 8749), (7403, 10769), (9422, 12788), (11442, 14807), (13461, 16826))
    assert default_annealing(6, 20192) == ade20k
    assert default_annealing(2, 600) == ((0, 100), (160, 260))
    assert default_annealing(1, 600) == ((0, 100),)
    model = model_of()
    seen = []
    for step in (0, 50, 100, 210, 260):
        model.set_progress(step, 600)
        seen.append(model.transformer_decoder.probabilities)
    assert seen == [(1, 1), (0.5**0.9, 1), (0, 1), (0, 0.5**0.9), (0, 0)]


@pytest.mark.parametrize("name", [DINOV3, DINOV2])
def test_a_training_step_is_a_function_of_seed_and_positions(name):
    model, images = model_of(name).train(), torch.randn(2, 3, 64, 64)
    for lateral in model.transformer_decoder.laterals:
        lateral.eval()  # batch statistics would make images depend on each other
    model.set_progress(50, 600)
    first = model(images, context([3, 4])).mask_logits()
    random_state = torch.get_rng_state()
    assert torch.equal(first, model(images, context([3, 4])).mask_logits())
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(first[1:], model(images[1:], context([4])).mask_logits(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, model(images, context([30, 40])).mask_logits(), rtol=1e-3)


def test_position_stretches_are_log_uniform_and_depend_on_seed_and_position():
    many = position_stretches(context(list(range(400))))
    assert 0.5 <= float(many.min()) < 0.51
    assert 1.98 < float(many.max()) <= 2
    assert abs(float(many.log().mean())) < 0.04
    assert torch.equal(many[7:9], position_stretches(context([7, 8])))
    assert not torch.equal(many, position_stretches(context(list(range(400)), seed=6)))


@pytest.mark.parametrize("name", [DINOV3, DINOV2])
def test_evaluation_is_deterministic_and_returns_one_prediction(name):
    model, images = model_of(name), torch.randn(1, 3, 40, 72)
    model.transformer_decoder.set_probabilities((1.0, 0.4))
    copy = model_of(name).eval()
    copy.load_state_dict(model.state_dict())
    found = copy(images)
    assert torch.equal(found.mask_logits(), copy(images, context([3])).mask_logits())
    assert len(found.class_logits) == 1
    assert not found.earlier_features
    assert found.mask_features.shape[2:] == (10, 18)
    for height, width in ((48, 80), (75, 90), (30, 30)):
        shape = copy(torch.randn(1, 3, height, width)).mask_features.shape[2:]
        assert shape == (-(-height // 4), -(-width // 4))
    copy.transformer_decoder.set_probabilities((0.0, 0.0))
    assert not torch.equal(copy(images).mask_logits(), found.mask_logits())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch inspects graph inputs
def test_compiled_regions_give_the_same_outputs():
    model, compiled = (model_of(depth=1, num_layers=1).train() for _ in range(2))
    images = torch.randn(2, 3, 64, 64)
    for one in (model, compiled):
        one.set_progress(50, 600)
    compile_regions(compiled, "aot_eager")
    expected, found = (one(images, context([3, 4])) for one in (model, compiled))
    torch.testing.assert_close(found.class_logits, expected.class_logits)
    torch.testing.assert_close(found.mask_logits(0), expected.mask_logits(0))
    assert len(model.regions) == len(set(model.regions)) == 5
    names = itertools.chain(*([name for name, _ in one.named_parameters()] for one in (model, compiled)))
    assert not any("_orig_mod" in name for name in names)


def test_incompatible_settings_are_refused():
    with pytest.raises(ConfigError, match=r"cannot be combined; set all of transformer_decoder\.kind pmt"):
        ModelConfig(transformer_decoder=PmtDecoderConfig())
    with pytest.raises(ConfigError, match="one pair of steps for each of num_layers"):
        PmtDecoderConfig(annealing=((0, 1),))
    with pytest.raises(ConfigError, match="blocks in ascending order"):
        PmtDecoderConfig(levels=(3, 1))
    with pytest.raises(ConfigError, match="has blocks 0 to 3"):
        model_of(levels=(1, 4))
