import pytest
import torch
from torch import Tensor

from m2f.model.backbones.timm_backbone import TimmBackbone
from m2f.model.config import TimmBackboneConfig


def outputs_and_gradients(backbone: TimmBackbone, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    maps = backbone(images)
    backbone.zero_grad()
    sum(features.square().mean() for features in maps).backward()
    return list(maps), [weight.grad.clone() for weight in backbone.parameters()]


@pytest.mark.parametrize(("name", "has_depthwise"), [("tf_efficientnet_lite0", True), ("resnet18", False)])
def test_depthwise_backbones_train_channels_last_with_the_same_gradients(name, has_depthwise):
    torch.manual_seed(0)
    backbone = TimmBackbone(TimmBackboneConfig(name=name, pretrained=False)).train()
    assert backbone._has_depthwise is has_depthwise
    layouts = []
    convolution = next(layer for layer in backbone.modules() if isinstance(layer, torch.nn.Conv2d))
    convolution.register_forward_pre_hook(
        lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    images = torch.randn(2, 3, 64, 96)
    maps, gradients = outputs_and_gradients(backbone, images)
    backbone._has_depthwise = False
    plain_maps, plain_gradients = outputs_and_gradients(backbone, images)
    assert layouts == [has_depthwise, False]
    assert all(features.is_contiguous() for features in maps)
    torch.testing.assert_close(maps, plain_maps, rtol=1e-5, atol=1e-5)
    for gradient, plain in zip(gradients, plain_gradients, strict=True):
        assert float((gradient - plain).norm()) <= 1e-4 * float(plain.norm()) + 1e-9
