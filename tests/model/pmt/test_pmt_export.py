"""Export of PMT as a graph, to ONNX and to the authors' format; export to Hugging Face is refused."""

from __future__ import annotations

from dataclasses import replace

import onnxruntime
import pytest
import torch

from m2f.model.errors import WeightsError
from m2f.model.export.graphs import Inference, export_hugging_face, export_program, write_onnx
from m2f.model.export.official import write_official
from m2f.model.weights.build import build_with_weights
from m2f.model.weights.files import count_classes
from tests.model.pmt.test_pmt_training import DINOV2, DINOV3, config_of, model_of


def trained_model(name: str, **settings):
    model = model_of(name, **settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.set_progress(1, 1)
    return model


@pytest.mark.parametrize(
    ("name", "size", "onnx"),
    [
        (DINOV3, None, False),
        pytest.param(DINOV3, None, True, marks=pytest.mark.soak),
        (DINOV2, (64, 64), True),
    ],
)
def test_exported_graph_gives_the_same_outputs(name, size, onnx, tmp_path):
    model = trained_model(name, depth=2, num_layers=1)
    program = export_program(model, size)
    images = torch.rand(1, 3, *(size or (96, 160))) * 255
    with torch.no_grad():
        expected = Inference(model)(images)
        for found, wanted in zip(program.module()(images), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    if onnx:
        write_onnx(program, tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        for found, wanted in zip(session.run(None, {"images": images.numpy()}), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", [DINOV3, DINOV2])
def test_authors_format_omits_a_frozen_backbone_and_loads_back(name, tmp_path):
    whole, head, backbone = (tmp_path / name for name in ("whole.bin", "head.bin", "backbone.pt"))
    model, frozen, free = trained_model(name), config_of(name), config_of(name, freeze=())
    write_official(model, frozen, head)
    write_official(model, free, whole)
    names = torch.load(head, weights_only=True).keys()
    assert not any("encoder" in name for name in names)
    assert names < torch.load(whole, weights_only=True).keys()
    assert count_classes(head) == 4
    with pytest.raises(WeightsError, match="the recipe names no backbone weights"):
        build_with_weights(frozen, head)
    again, report = build_with_weights(free, whole)
    assert report.complete
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())

    torch.save(timm_names(model.backbone.state_dict()), backbone)
    stated = replace(frozen, backbone=replace(frozen.backbone, weights=str(backbone)))
    again, report = build_with_weights(stated, head)
    assert report.complete
    assert report.head_alone
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


def timm_names(state):
    """Return a backbone's weights under the names of timm's whole model."""
    renamed = {name.replace("embed.proj.", "patch_embed.proj."): tensor for name, tensor in state.items()}
    return {name.removeprefix("embed."): tensor for name, tensor in renamed.items()}


def test_export_to_hugging_face_is_refused(tmp_path):
    model, config = model_of(), config_of()
    with pytest.raises(WeightsError, match=r"kind is upscale; Hugging Face's Mask2Former supports only ms_deform_attn"):
        export_hugging_face(model, config, tmp_path, ["a", "b", "c", "d"])
