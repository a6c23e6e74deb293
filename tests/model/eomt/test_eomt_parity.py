"""EoMT with random weights against outputs and gradients of the authors' code."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2f.model.backbones import plain_vit
from m2f.model.config import EomtDecoderConfig, ModelConfig, TimmBackboneConfig, UpscalePixelDecoderConfig
from m2f.model.eomt import eomt
from m2f.model.export.official import write_official
from m2f.model.mask2former import build_model
from m2f.model.segmenter import TrainingContext
from m2f.model.weights.eomt import eomt_to_authors
from m2f.model.weights.load import load_weights

CASES = ("eomt_dinov2_patch14", "eomt_dinov2_patch16_nonsquare", "eomt_dinov3_patch16")
NAMES = {"dinov2_registers": "vit_large_patch14_reg4_dinov2", "dinov3": "vit_small_patch16_dinov3_qkvb"}


def config_of(config: dict) -> ModelConfig:
    options = {key: config[key] for key in ("embed_dim", "depth", "num_heads", "patch_size")}
    options |= {"img_size": config["image_size"], "init_values": 1.0}
    if "mlp_hidden" in config:
        options["mlp_ratio"] = config["mlp_hidden"] / config["embed_dim"]
    backbone = TimmBackboneConfig(name=NAMES[config["backbone_kind"]], features="tokens", options=options)
    decoder = EomtDecoderConfig(num_queries=config["num_queries"], num_layers=config["num_query_blocks"])
    return ModelConfig(
        backbone=backbone,
        pixel_decoder=UpscalePixelDecoderConfig(),
        transformer_decoder=decoder,
        num_classes=config["num_classes"],
    )


@pytest.fixture(scope="module", params=CASES)
def case(request, authors_goldens: Path):
    folder = authors_goldens / "eomt" / request.param
    files = (load_file(folder / f"{name}.safetensors") for name in ("weights", "inputs", "outputs", "outputs_float64"))
    return json.loads((folder / "case.json").read_text()), *files


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.double()
    return float((actual - expected).abs().max() / expected.abs().max())


def mask_logits(predictions, layer: int) -> torch.Tensor:
    """Return mask logits in the dtype of the predictions; Predictions.mask_logits does not keep float64."""
    features = predictions.feature_maps[layer]
    return torch.einsum("bqc,bchw->bqhw", predictions.mask_embeddings[layer], features)


def stretched_positions(grid, dim: int, device: torch.device, *, factor: float) -> torch.Tensor:
    """Return the table of `rotary_positions` for coordinates that are multiplied by `factor`."""
    return plain_vit.rotations(plain_vit.rotary_angles(grid, dim, device) * factor)


def run(described: dict, model, images, draws, monkeypatch, masks):
    """Return the predictions with the authors' random draws. Append the arguments of each block to `masks`."""
    probabilities = described["mask_probability_per_block"]
    remaining_draws = iter(draws)
    rows = (
        torch.stack([next(remaining_draws) if p < 1 else torch.zeros_like(draws[0]) for p in probabilities])
        if draws
        else None
    )
    monkeypatch.setattr(eomt, "uniform_draws", lambda *_: rows)
    model.transformer_decoder.set_probabilities(tuple(probabilities))
    run_block = model.backbone.run
    monkeypatch.setattr(model.backbone, "run", lambda *args: masks.append(args[3:]) or run_block(*args))
    context = TrainingContext(None, 0) if draws else None  # type: ignore[arg-type] - nothing draws from it
    return model(images, context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_eomt_equals_the_authors_code(case, dtype, monkeypatch):
    described, weights, inputs, outputs, doubles = case
    expected = outputs if dtype == torch.float32 else doubles
    model = build_model(config_of(described["config"]), pretrained_backbone=False).to(dtype)
    report = load_weights(model, weights)
    assert not report.missing
    assert {name.rpartition(".")[2] for name in report.unexpected} <= {"pixel_mean", "pixel_std"}
    images = model.normalise(inputs["image_uint8"]).to(dtype)
    largest, compared = 0.0, []
    for one in described["runs"]:
        name = one["name"]
        if f"{name}/scalar" not in expected:
            continue
        model.train(one["masked_attention"]).zero_grad()
        masks: list[tuple] = []
        draws = {draw: outputs[f"{name}/{draw}"] for draw in one["random_draws"]}
        if (stretch := draws.pop("rope_rescale_log_draw", None)) is not None:  # not in the authors' training recipes
            stretched = partial(stretched_positions, factor=float(stretch.exp()))
            monkeypatch.setattr(plain_vit, "rotary_positions", stretched)
        found = run(one, model, images, list(draws.values()), monkeypatch, masks)
        monkeypatch.undo()
        compared.append(name)
        for layer in range(len(found.class_logits)):
            for kind, actual in (("class", found.class_logits[layer]), ("mask", mask_logits(found, layer))):
                if (key := f"{name}/{kind}_logits_layer{layer}") in expected:
                    largest = max(largest, relative(actual, expected[key]))
        for block, given in enumerate(masks):
            if (key := f"{name}/attention_allowed_block{block}") in expected and given and given[0] is not None:
                assert torch.equal(given[0][:, 0], expected[key].bool()), key
        largest = max(largest, scalar_and_gradients(model, found, name, expected))
    assert len(compared) == (len(described["runs"]) if dtype == torch.float32 else 1)
    assert largest <= (2e-5 if dtype == torch.float32 else 1e-6)


def test_official_export_has_the_names_and_values_of_the_authors(case, tmp_path):
    described, weights, *_ = case
    config = config_of(described["config"])
    model = build_model(config, pretrained_backbone=False)
    load_weights(model, weights)
    write_official(model, config, tmp_path / "eomt.pth")
    written = torch.load(tmp_path / "eomt.pth", weights_only=True)
    assert written.keys() == weights.keys()
    for name, tensor in weights.items():
        tolerance = 1e-7 if "pixel_" in name else 0.0  # the settings have 255 times these values
        torch.testing.assert_close(written[name].view_as(tensor), tensor, rtol=tolerance, atol=0.0)
    again = build_model(config, pretrained_backbone=False)
    assert not load_weights(again, written).missing
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def scalar_and_gradients(model, found, name, expected) -> float:
    pairs = [(found.class_logits[layer], mask_logits(found, layer)) for layer in range(len(found.class_logits))]
    scalar = sum(0.5 * classes.square().mean() + 0.5 * masks.square().mean() for classes, masks in pairs)
    scalar.backward()
    theirs = eomt_to_authors({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    differences = [relative(scalar[None], expected[f"{name}/scalar"])]
    for key, tensor in expected.items():
        if key.startswith(f"{name}/grad/"):
            differences.append(relative(theirs[f"network.{key.partition('/grad/')[2]}"].view_as(tensor), tensor))
    return max(differences)
