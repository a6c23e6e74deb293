import pytest
import torch

from m2f.model.analysis.flops.executed import build_shapes, executed_flops
from m2f.model.config import (
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    TimmBackboneConfig,
)
from m2f.trainer.telemetry.mfu import Utilization, peak_flops

SMALL = ModelConfig(
    backbone=TimmBackboneConfig(name="resnet10t", norm="group", options={"channels": (8, 16, 24, 32)}),
    pixel_decoder=MSDeformAttnPixelDecoderConfig(
        conv_dim=16, mask_dim=16, num_layers=1, num_heads=2, num_points=2, feedforward_dim=16
    ),
    transformer_decoder=MaskedTransformerDecoderConfig(
        num_queries=8, num_layers=2, hidden_dim=16, num_heads=2, feedforward_dim=16
    ),
    num_classes=10,
)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
    ],
)
def test_peaks_are_found_by_the_name_of_the_device(name, tflops):
    assert peak_flops(name) == tflops * 1e12


def test_a_device_without_a_known_peak_has_no_utilization():
    for name in ("Some GPU", "NVIDIA L40", "NVIDIA RTX A1000"):
        assert peak_flops(name) is None
    assert Utilization(SMALL, torch.device("cpu"), 1).share((64, 64), 10.0) is None


def test_utilization_is_three_forward_passes_over_the_peak_of_all_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    utilization = Utilization(SMALL, torch.device("cuda"), world_size=4)
    forward = 2 * executed_flops(build_shapes(SMALL), (64, 96)).total
    assert utilization.share((64, 96), 1000.0) == pytest.approx(3 * forward * 1000.0 / (4 * 989.4e12))
