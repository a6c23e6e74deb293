"""PMT with random weights against the authors' code: outputs, gradients, norm statistics and name conversion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2f.model.config import ModelConfig, PmtDecoderConfig, TimmBackboneConfig, UpscalePixelDecoderConfig
from m2f.model.eomt import eomt
from m2f.model.mask2former import build_model
from m2f.model.segmenter import TrainingContext
from m2f.model.weights.load import load_weights
from m2f.model.weights.pmt import pmt_to_authors

UNUSED_WEIGHTS = {"network.encoder.pixel_mean", "network.encoder.pixel_std"}


def model_of(config: dict):
    options = {key: config[key] for key in ("embed_dim", "depth", "num_heads")}
    options |= {"init_values": 1.0, "mlp_ratio": config["mlp_hidden"] / config["embed_dim"]}
    decoder = PmtDecoderConfig(
        num_queries=config["num_queries"],
        num_layers=config["num_decoder_blocks"],
        mlp_ratio=config["decoder_mlp_hidden"] / config["embed_dim"],
        levels=tuple(config["interaction_indices"]),
    )
    backbone = TimmBackboneConfig(name="vit_small_patch16_dinov3_qkvb", features="tokens", options=options)
    return build_model(
        ModelConfig(
            backbone=backbone,
            pixel_decoder=UpscalePixelDecoderConfig(),
            transformer_decoder=decoder,
            num_classes=config["num_classes"],
            freeze=("backbone",),
        ),
        pretrained_backbone=False,
    )


@pytest.fixture(scope="module")
def case(authors_goldens: Path):
    folder = authors_goldens / "pmt" / "pmt_dinov3_patch16"
    files = (load_file(folder / f"{name}.safetensors") for name in ("weights", "inputs", "outputs", "outputs_float64"))
    return json.loads((folder / "case.json").read_text()), *files


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.double()
    return float((actual - expected).abs().max() / expected.abs().max())


def run(described: dict, model, images, draws, monkeypatch):
    """Return the predictions with the authors' random draws, and the tokens and masks passed to the new blocks.

    With masked attention, the model is in training mode and so returns all predictions; norms use the mode of the run.
    """
    model.train(described["masked_attention"]).zero_grad()
    for lateral in model.transformer_decoder.laterals:
        lateral.train(described["mode"] == "train")
    monkeypatch.setattr(eomt, "uniform_draws", lambda *_: torch.stack(draws) if draws else None)
    model.transformer_decoder.set_probabilities(tuple(described["mask_probability_per_block"]))
    given: list[tuple] = []
    run_block, blocks = model.backbone.run, set(model.transformer_decoder.blocks)

    def spy(block, tokens, table, mask=None):
        if block in blocks:
            given.append((tokens, mask))
        return run_block(block, tokens, table, mask)

    monkeypatch.setattr(model.backbone, "run", spy)
    found = model(images, TrainingContext(None, 0) if draws else None)  # type: ignore[arg-type] - nothing draws
    monkeypatch.undo()
    return found, given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_pmt_equals_the_authors_code(case, dtype, monkeypatch):
    described, weights, inputs, outputs, doubles = case
    expected = outputs if dtype == torch.float32 else doubles
    model = model_of(described["config"]).to(dtype)
    report = load_weights(model, weights)
    assert report.complete
    assert set(report.unexpected) == UNUSED_WEIGHTS
    images = model.normalise(inputs["image_uint8"]).to(dtype)
    differences = []
    for one in described["runs"]:
        name = one["name"]
        draws = [outputs[key] for i in range(3) if (key := f"{name}/random_draw_{i}") in outputs]
        found, given = run(one, model, images, draws, monkeypatch)
        pairs = []
        for layer, feature_map in enumerate(found.feature_maps):
            masks = torch.einsum("bqc,bchw->bqhw", found.mask_embeddings[layer], feature_map)
            pairs.append((found.class_logits[layer], masks))
            of_kind = zip(("class", "mask"), pairs[-1], strict=True)
            differences += [(f"{name}/{kind}_logits_layer{layer}", actual) for kind, actual in of_kind]
        for block, (tokens, mask) in enumerate(given):
            differences.append((f"{name}/tokens_before_decoder_block{block}", tokens))
            if (key := f"{name}/attention_allowed_block{block}") in expected and mask is not None:
                assert torch.equal(mask[:, 0], expected[key].bool()), key
        scalar = sum(0.5 * classes.square().mean() + 0.5 * masks.square().mean() for classes, masks in pairs)
        differences.append((f"{name}/scalar", scalar[None]))
        scalar.backward()
        assert all(parameter.grad is None for parameter in model.backbone.parameters())
        theirs = pmt_to_authors({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        differences += [(f"{name}/grad/{key.removeprefix('network.')}", grad) for key, grad in theirs.items()]
        for index, lateral in enumerate(model.transformer_decoder.laterals if one["mode"] == "train" else ()):
            for kind in ("mean", "var"):
                moved = getattr(lateral.norm, f"running_{kind}").clone()
                differences.append((f"{name}/bn{index}_running_{kind}_after", moved))
        load_weights(model, weights)
    compared = [(key, relative(actual, expected[key])) for key, actual in differences if key in expected]
    missing = [key for key in expected if "/grad/" in key and key not in dict(compared)]
    assert not missing
    assert len(compared) == (46 if dtype == torch.float32 else 5)
    worst = max(compared, key=lambda pair: pair[1])
    assert worst[1] <= (2e-5 if dtype == torch.float32 else 1e-6), worst


def test_decoder_of_the_authors_loads_by_name_and_is_exported_unchanged(case):
    described, weights, *_ = case
    published = {name: tensor for name, tensor in weights.items() if not name.startswith("network.encoder.")}
    old = {"network.decoder.pe.freqs": torch.ones(2), "network.bn_prefix.weight": torch.ones(2)}
    old |= {"network._attn_mask_probs_fallback": torch.ones(2), "criterion.empty_weight": torch.ones(6)}
    model = model_of(described["config"])
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    report = load_weights(model, published | old)
    assert not report.unexpected
    assert {name.partition(".")[0] for name in report.missing} == {"backbone"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
    written = pmt_to_authors(model.state_dict())
    assert written.keys() == published.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in published.items())
    whole = pmt_to_authors(model.state_dict(), backbone=True)
    assert whole.keys() == weights.keys() - UNUSED_WEIGHTS


def test_file_without_mask_probabilities_loads_as_finished_training(case):
    described, weights, *_ = case
    model = model_of(described["config"])
    load_weights(model, {name: tensor for name, tensor in weights.items() if "probs" not in name})
    assert model.transformer_decoder.probabilities == (0.0, 0.0, 0.0)
