"""Memory estimated from shapes, against the allocations of a real step with the same config."""

from dataclasses import replace

import pytest
import torch

import m2f.model.analysis.memory
from m2f.model.analysis.memory import Activations, LiveBytesCounter, count_activations
from m2f.model.config import (
    FPNPixelDecoderConfig,
    LossConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    PilotConfig,
    TimmBackboneConfig,
)
from m2f.model.loss.criterion import compute_losses, count_normalizers
from m2f.model.loss.points import CounterPoints
from m2f.model.mask2former import build_model
from m2f.model.pilots import PilotQueries
from m2f.model.segmenter import TrainingContext
from m2f.model.structures import Targets

QUERIES, TARGETS, SIZE = 20, 6, 128
FPN = ModelConfig(
    backbone=TimmBackboneConfig(name="resnet10t", options={"channels": (16, 32, 48, 64)}),
    pixel_decoder=FPNPixelDecoderConfig(conv_dim=32, mask_dim=32),
    transformer_decoder=MaskedTransformerDecoderConfig(
        num_queries=QUERIES, num_layers=2, hidden_dim=32, num_heads=2, feedforward_dim=64
    ),
    loss=LossConfig(num_points=256),
    num_classes=5,
)
ENCODER = MSDeformAttnPixelDecoderConfig(conv_dim=32, mask_dim=32, num_layers=4, num_heads=2, feedforward_dim=128)


def striped_targets(images):
    """Return targets that divide every image into TARGETS horizontal stripes."""
    rows = torch.arange(SIZE) * TARGETS // SIZE + 1
    ids = torch.arange(1, TARGETS + 1).expand(images, -1)
    return Targets(
        id_maps=rows.to(torch.uint8)[:, None].expand(images, 1, SIZE, SIZE).contiguous(),
        labels=torch.zeros_like(ids),
        layer=torch.zeros_like(ids),
        local_id=ids,
        valid=torch.ones_like(ids, dtype=torch.bool),
        weight=torch.ones(images),
        dataset=torch.zeros(images, dtype=torch.int64),
        position=torch.arange(images),
    )


def allocated(config, images):
    """Return the memory of a real step on the CPU without weights and their gradients."""
    model = build_model(config, pretrained_backbone=False).train()
    queries = PilotQueries(config, seed=0)
    for parameter in (*model.parameters(), *queries.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    targets = striped_targets(images)
    normalizers = count_normalizers(targets, QUERIES, config.loss)
    pixels = torch.zeros(images, 3, SIZE, SIZE, dtype=torch.uint8)
    with LiveBytesCounter() as live:
        pilots = queries(targets) if config.pilots.max_targets else None
        predictions = model(model.normalise(pixels), TrainingContext(targets, 0, pilots))
        loss = compute_losses(predictions, targets, CounterPoints(0), normalizers, config.loss, 5, pilots).total
        kept = live.current
        loss.backward()
    return Activations(kept, live.peak)


@pytest.mark.parametrize(
    ("checkpointing", "box_share", "pilots"), [(False, 0.0, 0), (True, 0.0, 0), (False, 0.5, 0), (False, 0.0, 20)]
)
def test_memory_estimate_equals_the_allocation_of_a_real_step(checkpointing, box_share, pilots, monkeypatch):
    real_chunk_elements = m2f.model.analysis.memory.chunk_elements
    monkeypatch.setattr(
        m2f.model.analysis.memory, "chunk_elements", lambda device: real_chunk_elements(torch.device("cpu"))
    )
    loss = replace(FPN.loss, matching_box_share=box_share, supervision_box_share=box_share)
    backbone = replace(FPN.backbone, checkpointing=checkpointing)
    config = replace(FPN, backbone=backbone, loss=loss, pilots=PilotConfig(max_targets=pilots))
    counted = count_activations(config, 3, (SIZE, SIZE), TARGETS, False, torch.float32)
    real = allocated(config, 3)
    assert counted.kept == pytest.approx(real.kept, rel=0.05)
    assert counted.peak == pytest.approx(real.peak, rel=0.15)


def test_checkpointing_and_16_bits_use_less_memory():
    def peak(precision=torch.float32, autocast=False, **settings):
        config = replace(FPN, pixel_decoder=replace(ENCODER, **settings))
        return count_activations(config, 2, (SIZE, SIZE), TARGETS, autocast, precision).peak

    full = peak()
    assert peak(checkpointing=True) < 0.8 * full
    assert peak(autocast=True) < 0.9 * full
    assert peak(torch.bfloat16, autocast=True) < peak(autocast=True)


def test_pilots_use_more_memory():
    config = replace(FPN, pilots=PilotConfig(max_targets=100))
    few, many = (count_activations(config, 2, (SIZE, SIZE), number, False, torch.float32) for number in (6, 60))
    assert count_activations(FPN, 2, (SIZE, SIZE), 6, False, torch.float32).kept < few.kept < many.kept


def test_live_bytes_count_storages_and_not_views():
    with LiveBytesCounter() as live:
        first = torch.zeros(1000)
        view = first[10:].view(-1, 10)
        assert live.current == 4000
        first.add_(1)
        second = view + 1
        assert live.current == 4000 + 3960
        del first, view
        assert live.current == 3960
        del second
    assert (live.current, live.peak) == (0, 7960)
