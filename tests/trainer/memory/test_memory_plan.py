from dataclasses import replace

import pytest

from m2f.data_pipeline.config import DataConfig, LargeScaleJitter, MixtureItem
from m2f.model.config import (
    FPNPixelDecoderConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    TimmBackboneConfig,
)
from m2f.trainer.config import TrainingConfig, ZeroConfig
from m2f.trainer.memory.plan import MemoryPlan, format_memory, plan_memory
from m2f.trainer.memory.states import bytes_outside_module, state_bytes

TRAINING = TrainingConfig(max_steps=1, global_batch=16, micro_batch=2, precision="fp32")
SMALL_BUCKETS = ZeroConfig(stage=0, reduce_bucket_size=1)
"""Two buckets of one element take at most 8 bytes."""


@pytest.mark.parametrize(
    ("precision", "stage", "bytes_per_weight"),
    [
        ("fp32", 0, 4 + 4 + 8),
        ("fp32", 1, 4 + 4 + 12 / 4),
        ("bf16_autocast", 2, 4 + 4 / 4 + 12 / 4),
        ("bf16", 2, 2 + 2 / 4 + 12 / 4),
        ("bf16", 3, (2 + 2 + 12) / 4),
    ],
)
def test_state_bytes_depend_on_stage_and_precision(precision, stage, bytes_per_weight):
    training = replace(TRAINING, zero=replace(SMALL_BUCKETS, stage=max(stage, 1)), precision=precision)
    training = replace(training, zero=replace(SMALL_BUCKETS, stage=stage))
    assert state_bytes(1000, training, world=4) == pytest.approx(1000 * bytes_per_weight, abs=8)
    assert state_bytes(1000, replace(training, ema_decay=0.9), world=4) == pytest.approx(
        1000 * (bytes_per_weight + 4 / 4), abs=8
    )


def test_state_bytes_include_buckets_and_exclude_offloaded_state():
    one = replace(TRAINING, zero=ZeroConfig(stage=1, reduce_bucket_size=100, overlap_comm=False))
    two = replace(TRAINING, zero=ZeroConfig(stage=1, reduce_bucket_size=100))
    offloaded = replace(TRAINING, zero=ZeroConfig(stage=1, reduce_bucket_size=100, offload_optimizer=True))
    assert state_bytes(1000, two, 4) - state_bytes(1000, one, 4) == 4 * 100
    assert state_bytes(1000, two, 4) - state_bytes(1000, offloaded, 4) == 12 * 250


def test_a_probe_counts_what_zero_keeps_beside_the_module():
    sharded = replace(TRAINING, zero=ZeroConfig(stage=1, reduce_bucket_size=100))
    assert bytes_outside_module(1000, sharded, 4) == 4 * 2 * 100 + 12 * 250
    assert bytes_outside_module(1000, replace(TRAINING, zero=SMALL_BUCKETS), 4) == 8 * 1000
    assert bytes_outside_module(1000, replace(TRAINING, zero=replace(SMALL_BUCKETS, stage=3)), 1000) == 0


def test_largest_micro_batch_fits_into_the_gpu():
    plan = MemoryPlan(size=(64, 64), micro_batch=2, states=10, fixed=5, per_image=20)
    assert plan.peak(3) == 75
    assert plan.largest_micro_batch(100) == 3
    assert plan.largest_micro_batch(10) == 0
    assert "not even one image fits into a GPU of 1e-08 GB" in format_memory(plan, 8, 1, 1e-8)


def test_a_recipe_is_planned_without_a_gpu():
    model = ModelConfig(
        backbone=TimmBackboneConfig(name="resnet10t", options={"channels": (8, 16, 24, 32)}),
        pixel_decoder=FPNPixelDecoderConfig(conv_dim=16, mask_dim=16),
        transformer_decoder=MaskedTransformerDecoderConfig(num_layers=1, hidden_dim=16, num_heads=2),
        num_classes=3,
    )
    data = DataConfig(train=(MixtureItem(dataset="train"),), augment=LargeScaleJitter(size=96))
    small = plan_memory(model, data, TRAINING, world=8, targets=5)
    large = plan_memory(model, replace(data, augment=LargeScaleJitter(size=192)), TRAINING, world=8, targets=5)
    assert (small.size, small.micro_batch) == ((96, 96), 2)
    assert small.states == large.states
    assert small.per_image < large.per_image < 4.5 * small.per_image
    assert small.largest_micro_batch(80e9) > large.largest_micro_batch(80e9) > 100
