"""Decoder and losses each copy the mask features, a large tensor, only once. Losses are tested on fake CUDA tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from m2f.model.config import LossConfig, MaskedTransformerDecoderConfig
from m2f.model.loss import criterion, matcher
from m2f.model.loss.criterion import compute_losses, count_normalizers
from m2f.model.loss.points import CounterPoints
from m2f.model.structures import Predictions
from m2f.model.transformer_decoder.masked import MaskedTransformerDecoder
from tests.model.loss_oracle import CLASSES, make_predictions, make_targets
from tests.model.test_waits import FakeCopy

BOXES = LossConfig(num_points=96, matching_box_share=0.5, supervision_box_share=0.5)
CASTS = (torch.ops.aten._to_copy.default,)
COPIES = (*CASTS, torch.ops.aten.clone.default)


class CountCopies(TorchDispatchMode):
    """Counts copies of tensors with `size` elements."""

    def __init__(self, size: int, operations: tuple[torch._ops.OpOverload, ...] = COPIES) -> None:
        super().__init__()
        self.size, self.operations, self.count = size, operations, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self.operations and args[0].numel() == self.size
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [LossConfig(num_points=96), BOXES], ids=["uniform points", "box points"])
def test_matching_and_losses_share_one_copy(config, monkeypatch):
    monkeypatch.setattr(matcher, "HostCopy", FakeCopy)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    targets = make_targets((3, 5))
    predictions = make_predictions(2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        targets = targets.to("cuda", non_blocking=True)
        on_gpu = Predictions(
            *(
                torch.empty_like(tensor, dtype=torch.bfloat16, device="cuda").requires_grad_()
                for tensor in predictions[:3]
            )
        )
        normalizers = count_normalizers(targets, predictions.class_logits.shape[2], config)
        with CountCopies(predictions.mask_features.numel()) as copies:
            compute_losses(on_gpu, targets, CounterPoints(0), normalizers, config, CLASSES)
    assert copies.count == 1


@pytest.mark.parametrize("config", [LossConfig(num_points=96), BOXES], ids=["uniform points", "box points"])
def test_matching_and_losses_on_a_cpu_share_one_cast(config):
    """The matcher also copies the layout, which on a CPU is faster than converting the gradient of the losses."""
    targets, predictions = make_targets((3, 5)), make_predictions(2)
    predictions = Predictions(*(tensor.detach().bfloat16().requires_grad_() for tensor in predictions[:3]))
    normalizers = count_normalizers(targets, predictions.class_logits.shape[2], config)
    with torch.autocast("cpu", torch.bfloat16), CountCopies(predictions.mask_features.numel(), CASTS) as casts:
        compute_losses(predictions, targets, CounterPoints(0), normalizers, config, CLASSES)
    assert casts.count == 1


def test_attention_masks_of_all_levels_share_one_copy():
    config = MaskedTransformerDecoderConfig(hidden_dim=32, num_heads=4, num_queries=5, num_layers=3, feedforward_dim=32)
    decoder = MaskedTransformerDecoder(config, 32, 32, num_classes=3)
    features = [torch.randn(1, 32, *size) for size in ((2, 3), (4, 6), (8, 12))]
    mask_features = torch.randn(1, 32, 16, 24).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), CountCopies(mask_features.numel()) as copies:
        decoder(features, mask_features)
    assert copies.count == 1


def test_losses_do_not_depend_on_the_layout_of_the_features(monkeypatch):
    targets, predictions = make_targets((3, 5)), make_predictions(2)
    normalizers = count_normalizers(targets, predictions.class_logits.shape[2], BOXES)

    def losses_and_gradients() -> list[torch.Tensor]:
        total, terms, _ = compute_losses(predictions, targets, CounterPoints(1), normalizers, BOXES, CLASSES)
        return [terms.detach(), *torch.autograd.grad(total, predictions[:3])]

    as_on_cpus = losses_and_gradients()
    monkeypatch.setattr(
        criterion,
        "_full_precision_maps",
        lambda maps: [tensor.float().contiguous(memory_format=torch.channels_last) for tensor in maps],
    )
    torch.testing.assert_close(losses_and_gradients(), as_on_cpus, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_gradients_of_features_keep_their_memory_format(memory_format):
    targets, predictions = make_targets((3, 5)), make_predictions(2)
    features = predictions.mask_features.detach().contiguous(memory_format=memory_format).requires_grad_()
    config = LossConfig(num_points=96)
    normalizers = count_normalizers(targets, predictions.class_logits.shape[2], config)
    seen = []
    copied = features.clone()  # a leaf would give the gradient its own format
    copied.register_hook(seen.append)
    predictions = predictions._replace(mask_features=copied)
    compute_losses(predictions, targets, CounterPoints(0), normalizers, config, CLASSES).total.backward()
    assert seen[0].is_contiguous(memory_format=memory_format)
