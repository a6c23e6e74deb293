"""Tests that evaluation adds published differences of weights to the base weights, but not weights that m2f wrote."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch

from m2f.cluster.evaluation.weights import model_with_weights
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.config import EomtDecoderConfig, ModelConfig, TimmBackboneConfig, UpscalePixelDecoderConfig
from m2f.model.mask2former import build_model
from m2f.model.weights.eomt import eomt_to_authors

NAME = "vit_small_patch16_dinov3_qkvb"
OPTIONS = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 64, "init_values": 1.0, "mlp_ratio": 2.0}


@pytest.mark.parametrize("file", ["deltas.bin", "own.pth"])
def test_evaluated_weights_are_added_to_the_base_weights_unless_m2f_wrote_them(tmp_path, file):
    base = timm.create_model(NAME, num_classes=0, **OPTIONS)
    torch.save(base.state_dict(), tmp_path / "base.pt")
    config = ModelConfig(
        backbone=TimmBackboneConfig(name=NAME, features="tokens", options=OPTIONS, weights=str(tmp_path / "base.pt")),
        pixel_decoder=UpscalePixelDecoderConfig(),
        transformer_decoder=EomtDecoderConfig(num_queries=6, num_layers=2),
        num_classes=5,
    )
    start = build_model(config).state_dict()
    trained = build_model(config, pretrained_backbone=False).state_dict()
    deltas = {key: value - start[key] if key.startswith("backbone.") else value for key, value in trained.items()}
    torch.save(eomt_to_authors(deltas), tmp_path / "deltas.bin")
    torch.save(trained, tmp_path / "own.pth")

    published = replace(config, weights=str(tmp_path / "deltas.bin"), weights_are_deltas=True)
    found = model_with_weights(published, str(tmp_path / file), Storage(), device="cpu").state_dict()
    for key, value in trained.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
