"""Synchronisations of a training step with the GPU, counted on fake CUDA tensors, which have no values.

An operation that needs a value of a fake tensor raises an error. A step that completes therefore reads values only
through `HostCopy`, which is replaced by a fake: the matching costs and, with pilots, their targets.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from m2f.model.config import (
    LossConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    PilotConfig,
    TimmBackboneConfig,
)
from m2f.model.deform_attn import module as ms_deform_attn
from m2f.model.loss import assignment, matcher
from m2f.model.loss.criterion import compute_losses, count_normalizers
from m2f.model.loss.host_copies import HostCopy
from m2f.model.loss.points import CounterPoints
from m2f.model.mask2former import build_model
from m2f.model.pilots import PilotQueries
from m2f.model.segmenter import TrainingContext
from tests.model.loss_oracle import make_targets

QUERIES, CLASSES = 8, 5
CONFIG = ModelConfig(
    backbone=TimmBackboneConfig(name="resnet10t", options={"channels": (8, 16, 24, 32)}),
    pixel_decoder=MSDeformAttnPixelDecoderConfig(
        conv_dim=16, mask_dim=16, num_layers=1, num_heads=2, num_points=2, feedforward_dim=16
    ),
    transformer_decoder=MaskedTransformerDecoderConfig(
        num_queries=QUERIES, num_layers=3, hidden_dim=16, num_heads=2, feedforward_dim=16
    ),
    loss=LossConfig(num_points=64),
    num_classes=CLASSES,
)


class BlockingCopies(TorchDispatchMode):
    """Records the shapes of copies between devices that would block the host."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            moved = args[0].device.type != result.device.type
        elif func is torch.ops.aten.copy_.default:
            moved = args[0].device.type != args[1].device.type
        else:
            return result
        if moved and not (kwargs or {}).get("non_blocking") and args[2:] != (True,):
            self.seen.append(tuple(result.shape))
        return result


class FakeCopy:
    """Fake of HostCopy without an event. Returns random costs and counts the waits."""

    waits = 0

    def __init__(self, tensor: Tensor):
        self.copy = tensor.to("cpu", non_blocking=True)

    def wait(self):
        FakeCopy.waits += 1
        if not self.copy.is_floating_point():  # targets of the pilots
            return np.ones(self.copy.shape, dtype=np.int64)
        return np.random.default_rng(0).random(self.copy.shape, dtype=np.float32)


def step(loss=CONFIG.loss, pilots=False):
    """Compute the forward pass and the losses of two images; return the shapes of blocking copies."""
    model = build_model(CONFIG, pretrained_backbone=False)
    queries = PilotQueries(replace(CONFIG, pilots=PilotConfig(max_targets=4, mask_noise=0.2)), seed=0)
    targets = make_targets((3, 5))
    normalizers = count_normalizers(targets, QUERIES, loss)
    images = torch.zeros(2, 3, *targets.id_maps.shape[-2:])
    with FakeTensorMode(allow_non_fake_inputs=True), BlockingCopies() as blocking:
        model = model.to("cuda")
        queries = queries.to("cuda")
        targets = targets.to("cuda", non_blocking=True)
        images = images.to("cuda", non_blocking=True)
        normalizers = type(normalizers)(*(number.to("cuda", non_blocking=True) for number in normalizers))
        blocking.seen.clear()  # copies of the model do not count
        pilot_queries = queries(targets) if pilots else None
        predictions = model(model.normalise(images), TrainingContext(targets, 0, pilot_queries))
        losses = compute_losses(predictions, targets, CounterPoints(0), normalizers, loss, CLASSES, pilot_queries)
    assert losses.total.device.type == "cuda"
    return blocking.seen


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["uniform points", "box points"])
def test_step_waits_for_the_device_once_and_copies_asynchronously(share, monkeypatch):
    monkeypatch.setattr(matcher, "HostCopy", FakeCopy)
    monkeypatch.setattr(ms_deform_attn, "_kernel_agrees", lambda *sizes: False)  # no GPU to check it on
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    FakeCopy.waits = 0
    assert step(replace(CONFIG.loss, matching_box_share=share, supervision_box_share=share)) == []
    assert FakeCopy.waits == 1


def test_step_with_pilots_waits_for_the_device_twice(monkeypatch):
    for module in (matcher, assignment):
        monkeypatch.setattr(module, "HostCopy", FakeCopy)
    monkeypatch.setattr(ms_deform_attn, "_kernel_agrees", lambda *sizes: False)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    FakeCopy.waits = 0
    assert step(pilots=True) == []
    assert FakeCopy.waits == 2


def test_the_wait_counter_detects_blocking_reads_and_copies():
    with FakeTensorMode(), BlockingCopies() as blocking:
        torch.ones(3).to("cuda")
        torch.ones(2).to("cuda", non_blocking=True)
        assert blocking.seen == [(3,)]
        with pytest.raises(DataDependentOutputException):
            torch.ones(3, device="cuda").sum().item()


def test_host_copy_has_the_values_of_its_source():
    values = torch.arange(6.0).view(2, 3)
    assert np.array_equal(HostCopy(values).wait(), values.numpy())


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_matching_does_not_depend_on_the_number_of_threads(monkeypatch, threads):
    cost = torch.rand(3, 6, 9, 12, generator=torch.Generator().manual_seed(0))
    counted = (torch.arange(12) < torch.tensor([0, 1, 5, 9, 11, 12])[:, None]).float()
    packed = HostCopy(torch.cat((cost.flatten(), counted.flatten())))
    pending = matcher.PendingMatching(packed, cost.shape)
    with ThreadPoolExecutor(threads) as pool:
        monkeypatch.setattr(matcher, "_solvers", lambda: pool)
        found = pending.result().query_index
    for layer, image in np.ndindex(3, 6):
        n = int(counted[image].sum())
        assert (found[layer, image, n:] == -1).all()
        assert np.array_equal(found[layer, image, :n], matcher.assign(cost[layer, image, :, :n].numpy()))
