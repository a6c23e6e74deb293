"""Loss scaling for fp16, and an fp32 pixel decoder, in one process without DeepSpeed."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from m2f.model.config import PilotConfig
from m2f.model.loss.criterion import count_normalizers
from m2f.model.mask2former import build_model
from m2f.trainer.engine.loss_scale import GROWTH_STEPS, INITIAL_SCALE, LossScale
from m2f.trainer.engine.module import TrainingModule
from tests.trainer.engine_ranks import make_images
from tests.trainer.tiny_job import MODEL

PILOTED = replace(MODEL, pilots=PilotConfig(max_targets=8))


def test_the_scale_halves_at_an_overflow_and_doubles_after_many_good_steps():
    scale = LossScale([])
    scale.update(applied=False)
    scale.update(applied=False)
    assert scale.scale == INITIAL_SCALE / 4
    for _ in range(GROWTH_STEPS - 1):
        scale.update(applied=True)
    assert scale.scale == INITIAL_SCALE / 4
    resumed = LossScale([])
    resumed.load(scale.state())
    for each in (scale, resumed):
        each.update(applied=True)
        assert each.state() == {"scale": INITIAL_SCALE / 2, "good_steps": 0}


def test_gradients_are_unscaled_but_overflow_when_scaled():
    weight = nn.Parameter(torch.tensor([3.0, -2.0]))
    scale = LossScale([weight])

    def gradient(factor):
        weight.grad = None
        total = scale.scale_gradients((weight.half() * factor).float().sum())
        total.backward()
        return total.detach(), weight.grad

    assert not gradient(1.0)[1].isfinite().any()  # 65536 exceeds the largest float16
    scale.update(applied=False)
    assert gradient(1.0)[1].tolist() == [1.0, 1.0]
    total, small = gradient(2.0**-24)  # smallest positive float16
    assert total == 2.0**-24
    assert small.tolist() == [2.0**-24] * 2


def gradients(precision, **options):
    """Return the gradients by parameter name, and the pixel decoder's dtypes and autocast state.

    Parameters include those of pilots, which belong to the training module and not to the model.
    """
    torch.manual_seed(0)
    model = build_model(PILOTED, pretrained_backbone=False)
    module = TrainingModule(model, PILOTED, 3, precision, **options)
    seen = {}

    def record(_, inputs, outputs):
        mask_features, features = outputs
        tensors = [*inputs[0], mask_features, *features]
        seen["dtypes"] = {tensor.dtype for tensor in tensors}
        seen["autocast"] = torch.is_autocast_enabled("cpu")

    module.model.pixel_decoder.register_forward_hook(record)
    batch = make_images(MODEL, range(4))
    normalizers = count_normalizers(batch.targets, MODEL.transformer_decoder.num_queries, MODEL.loss)
    finite = False
    while not finite:  # the initial scale overflows; each failed step halves it
        module.zero_grad()
        module(batch, normalizers).total.backward()
        finite = all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)
        if module.loss_scale is not None:
            module.loss_scale.update(finite)
    return {name: parameter.grad for name, parameter in module.named_parameters()}, seen


@pytest.mark.parametrize(
    ("precision", "options", "tolerance"),
    [("fp16_autocast", {}, 0.06), ("bf16_autocast", {"pixel_decoder_fp32": True}, 0.5)],
)
def test_gradients_are_close_to_fp32_with_the_pixel_decoder_in_fp32(precision, options, tolerance):
    exact, _ = gradients("fp32")
    close, seen = gradients(precision, **options)
    assert seen == {"dtypes": {torch.float32}, "autocast": False}
    assert all(gradient.dtype == torch.float32 for gradient in close.values())
    norm, error = (
        math.sqrt(sum(float(g.square().sum()) for g in each))
        for each in (exact.values(), [close[name] - exact[name] for name in exact])
    )
    assert 0 < error < tolerance * norm
    of_pilots = "pilots.class_query.weight"
    assert 0 < (close[of_pilots] - exact[of_pilots]).norm() < tolerance * exact[of_pilots].norm()


def test_pixel_decoder_runs_under_autocast_by_default():
    _, seen = gradients("bf16_autocast")
    assert seen["autocast"]
    assert torch.bfloat16 in seen["dtypes"]
