"""Mask annealing: random draws depend only on seed and position, and evaluation is deterministic."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from m2f.model.config import EomtDecoderConfig, ModelConfig, TimmBackboneConfig, UpscalePixelDecoderConfig
from m2f.model.eomt.annealing import annealing_steps, uniform_draws
from m2f.model.mask2former import build_model
from m2f.model.segmenter import TrainingContext
from m2f.trainer.engine.compile import compile_regions

OPTIONS = {"embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 1.0}


def model_of(name: str = "vit_small_patch16_dinov3_qkvb", power: float = 0.9, **options: object):
    torch.manual_seed(3)
    config = ModelConfig(
        backbone=TimmBackboneConfig(name=name, features="tokens", options=OPTIONS | options),
        pixel_decoder=UpscalePixelDecoderConfig(),
        transformer_decoder=EomtDecoderConfig(num_queries=6, num_layers=2, annealing_power=power),
        num_classes=4,
    )
    return build_model(config, pretrained_backbone=False)


def context(positions: list[int], seed: int = 5) -> TrainingContext:
    return TrainingContext(SimpleNamespace(position=torch.tensor(positions)), seed)  # type: ignore[arg-type]


def test_annealed_buffers_of_frozen_parts_are_not_among_the_frozen_names():
    model = model_of()
    assert model.frozen_names() == frozenset()
    model.freeze(("backbone", "transformer_decoder"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.set_progress(5, 10)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"transformer_decoder.attn_mask_probs"}
    parts = ("backbone.", "transformer_decoder.")
    assert model.frozen_names() == {name for name in before if name.startswith(parts)} - changed


def test_random_draws_depend_only_on_seed_and_position():
    whole = uniform_draws(context([7, 8, 9]), 4, 50)
    assert torch.equal(whole[:, 1:], uniform_draws(context([8, 9]), 4, 50))
    assert torch.equal(whole[:2], uniform_draws(context([7, 8, 9]), 2, 50))
    others = [uniform_draws(context([7, 8, 9], seed=6), 4, 50), whole.flip(0), whole.flip(1), whole.flip(2)]
    assert all(not torch.equal(whole, other) for other in others)
    many = uniform_draws(context(list(range(200))), 4, 50)
    assert many.min() >= 0
    assert many.max() < 1
    assert abs(float(many.mean()) - 0.5) < 0.01
    assert abs(float(many.std()) - 12**-0.5) < 0.01


def test_training_step_derives_mask_probabilities_from_progress():
    model, images = model_of().train(), torch.randn(2, 3, 64, 64)
    model.set_progress(25, 60)  # block 0 anneals over steps 10 to 20, block 1 over 40 to 50
    first, second = model.transformer_decoder.probabilities
    assert first == 0
    assert second == 1
    model.set_progress(15, 60)
    halves = model(images, context([3, 4])).mask_logits()
    assert torch.equal(halves, model(images, context([3, 4])).mask_logits())
    assert torch.equal(halves[1:], model(images[1:], context([4])).mask_logits()) or torch.allclose(
        halves[1:], model(images[1:], context([4])).mask_logits(), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(halves, model(images, context([30, 40])).mask_logits(), rtol=1e-3)


@pytest.mark.parametrize(
    ("layers", "starts"),
    [
        (3, [14782, 36955, 59128]),
        (4, [14782, 29564, 44346, 59128]),
        (5, [14782, 25869, 36955, 48042, 59128]),
    ],
)
def test_annealing_steps_equal_the_published_ones_for_coco(layers, starts):
    expected = tuple((start, start + 14782) for start in starts)
    assert annealing_steps(EomtDecoderConfig(num_layers=layers), 88692) == expected


@pytest.mark.parametrize(("power", "expected"), [(1.0, 0.25), (2.0, 0.0625), (0.0, 1.0)])
def test_mask_probability_decays_with_the_annealing_power(power, expected):
    model = model_of(power=power)
    model.set_progress(45, 120)  # block 0 anneals over steps 20 to 40, block 1 over 80 to 100
    assert model.transformer_decoder.probabilities == (0.0, 1.0)
    model.set_progress(35, 120)
    assert model.transformer_decoder.probabilities == pytest.approx((expected, 1.0))


def test_evaluation_is_deterministic_and_uses_stored_probabilities():
    model, images = model_of(), torch.randn(1, 3, 64, 64)
    results = {}
    for name, probabilities in {"masks": (1.0, 1.0), "most": (0.6, 0.5), "few": (0.4, 0.1), "none": (0.0, 0.0)}.items():
        model.transformer_decoder.set_probabilities(probabilities)
        copy = model_of().eval()
        copy.load_state_dict(model.state_dict())
        random_state = torch.get_rng_state()
        results[name] = copy(images)
        assert torch.equal(torch.get_rng_state(), random_state)
        with_context = copy(images, context([3]))
        assert torch.equal(with_context.mask_logits(), results[name].mask_logits())
    assert torch.equal(results["masks"].mask_logits(), results["most"].mask_logits())
    assert torch.equal(results["few"].mask_logits(), results["none"].mask_logits())
    assert not torch.equal(results["masks"].mask_logits(), results["none"].mask_logits())
    assert all(len(found.class_logits) == 1 and not found.earlier_features for found in results.values())


def test_images_may_have_any_size():
    for name, options in (
        ("vit_small_patch16_dinov3_qkvb", {}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 64}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "patch_size": 14}),
    ):
        model = model_of(name, **options).eval()
        stride = model.pixel_decoder.stride
        for height, width in ((64, 64), (33, 90), (5, 16)):
            found = model(torch.randn(1, 3, height, width))
            assert found.mask_features.shape[2:] == (-(-height // stride), -(-width // stride))


def test_every_parameter_gets_a_gradient():
    model = model_of().train()
    found = model(torch.randn(1, 3, 48, 64), context([0]))
    assert len(found.feature_maps) == len(found.class_logits) == 3
    sum(found.mask_logits(layer).sum() + found.class_logits[layer].sum() for layer in range(3)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch inspects graph inputs
def test_compiled_regions_give_the_same_outputs():
    model, images = model_of().train(), torch.randn(2, 3, 64, 64)
    model.set_progress(15, 60)
    expected = model(images, context([3, 4]))
    compile_regions(model, "aot_eager")
    found = model(images, context([3, 4]))
    torch.testing.assert_close(found.class_logits, expected.class_logits)
    torch.testing.assert_close(found.mask_logits(0), expected.mask_logits(0))
