"""Feature maps stay channels-last through the whole backbone, even if ZeRO changes the memory format of the weights."""

import pytest
import torch
from torch import nn

from m2f.data_pipeline.config import DataConfig, LargeScaleJitter, MixtureItem
from m2f.model.config import (
    FPNPixelDecoderConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    TimmBackboneConfig,
)
from m2f.model.mask2former import build_model
from m2f.trainer.config import TrainingConfig
from m2f.trainer.job import TrainJob
from m2f.trainer.memory.probe import largest_batch

MODEL = ModelConfig(
    backbone=TimmBackboneConfig(name="resnet10t", options={"channels": (8, 16, 24, 32)}),
    pixel_decoder=FPNPixelDecoderConfig(conv_dim=16, mask_dim=16),
    transformer_decoder=MaskedTransformerDecoderConfig(
        num_queries=8, num_layers=1, hidden_dim=16, num_heads=2, feedforward_dim=16
    ),
    num_classes=3,
)


def flatten_as_zero_does(module):
    """Replace the weights by views of one flat tensor in logical order. Values are kept, memory formats are lost."""
    parameters = list(module.parameters())
    flat = torch._C._nn.flatten_dense_tensors([p.detach() for p in parameters])
    views = torch._C._nn.unflatten_dense_tensors(flat, [p.detach() for p in parameters])
    for parameter, view in zip(parameters, views, strict=True):
        parameter.data = view


@pytest.mark.parametrize("size", [64, 80], ids=["whole", "padded"])
def test_images_and_backbone_maps_are_channels_last(size):
    """ZeRO makes the weights contiguous, so only the images determine the memory format.

    Images for an accelerator are checked on the meta device.
    """
    data = DataConfig(train=(MixtureItem(dataset="train"),), augment=LargeScaleJitter(size=size))
    job = TrainJob(run_folder="", model=MODEL, data=data, shards=("",), training=TrainingConfig(max_steps=1))
    batch = largest_batch(job, 2, targets=3)
    model = build_model(MODEL, pretrained_backbone=False).to(memory_format=torch.channels_last)
    kernels = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flatten_as_zero_does(model)
    assert all(torch.equal(parameter, kernels[name]) for name, parameter in model.named_parameters())

    images = model.normalise(batch.images.to("meta"), batch.sizes)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert model.normalise(batch.images, batch.sizes).is_contiguous()
    seen = []
    for layer in model.backbone.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, inputs, output: seen.extend((*inputs, output)))
    model.backbone(torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last))
    assert len(seen) > 20
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen)
