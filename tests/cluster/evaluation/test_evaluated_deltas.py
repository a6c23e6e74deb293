"""Tests that published differences of weights are added to the base weights, but not weights that m2f wrote."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch

from m2f.cluster.evaluation.weights import model_with_weights
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.config import EomtDecoderConfig, ModelConfig, TimmBackboneConfig, UpscalePixelDecoderConfig
from m2f.model.mask2former import build_model
from m2f.model.weights.eomt import eomt_to_authors, eomt_to_transformers
from m2f.trainer.checkpoint.identity import METADATA_KEY
from m2f.trainer.start_model import start_model
from tests.trainer.checkpoint.test_identity import IDENTITY, RULES
from tests.trainer.tiny_job import make_job

NAME = "vit_small_patch16_dinov3_qkvb"
OPTIONS = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 64, "init_values": 1.0, "mlp_ratio": 2.0}


@pytest.mark.parametrize("file", ["deltas.bin", "own.pth", "exported.pth"])
def test_weights_are_added_to_the_base_weights_unless_m2f_wrote_them(tmp_path, file):
    base = timm.create_model(NAME, num_classes=0, **OPTIONS)
    torch.save(base.state_dict(), tmp_path / "base.pt")
    config = ModelConfig(
        backbone=TimmBackboneConfig(name=NAME, features="tokens", options=OPTIONS, weights=str(tmp_path / "base.pt")),
        pixel_decoder=UpscalePixelDecoderConfig(),
        transformer_decoder=EomtDecoderConfig(num_queries=6, num_layers=2),
        num_classes=5,
        pixel_mean=RULES.pixel_mean,
        pixel_std=RULES.pixel_std,
    )
    start = build_model(config).state_dict()
    trained = build_model(config, pretrained_backbone=False).state_dict()
    deltas = {key: value - start[key] if key.startswith("backbone.") else value for key, value in trained.items()}
    torch.save(eomt_to_authors(deltas), tmp_path / "deltas.bin")
    torch.save(trained, tmp_path / "own.pth")
    exported = {"model": eomt_to_transformers(trained), METADATA_KEY: IDENTITY.to_json()}
    torch.save(exported, tmp_path / "exported.pth")

    recipe = replace(config, weights=str(tmp_path / file), weights_are_deltas=True)
    evaluated = model_with_weights(recipe, str(tmp_path / file), Storage(), device="cpu")
    started, _ = start_model(replace(make_job(tmp_path / "run", ""), model=recipe), Storage(), None)
    for key, value in trained.items():
        torch.testing.assert_close(evaluated.state_dict()[key], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(started.state_dict()[key], value, rtol=1e-5, atol=1e-6)
