import copy
import dataclasses

import pytest
import torch
from torch import nn

from m2f.model.config import (
    LossConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    TimmBackboneConfig,
)
from m2f.model.errors import ConfigError
from m2f.model.loss.criterion import compute_losses, count_normalizers
from m2f.model.loss.points import CounterPoints
from m2f.model.mask2former import build_model
from m2f.model.weights.load import load_weights
from tests.model.loss_oracle import make_targets

NUM_CLASSES = 7
TINY = ModelConfig(
    # A small bottleneck ResNet that Hugging Face can also build.
    backbone=TimmBackboneConfig(name="resnet50", options={"layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32)}),
    pixel_decoder=MSDeformAttnPixelDecoderConfig(
        conv_dim=64, mask_dim=32, num_layers=2, num_heads=4, feedforward_dim=48
    ),
    transformer_decoder=MaskedTransformerDecoderConfig(
        num_queries=9, num_layers=5, hidden_dim=64, num_heads=4, feedforward_dim=80
    ),
    num_classes=NUM_CLASSES,
)


def hugging_face_twin(hidden_dim=64):
    """Return the independent implementation in `transformers`, with noise on all weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.ResNetConfig(
            embedding_size=64,
            hidden_sizes=[32, 64, 96, 128],
            depths=[1, 2, 1, 1],
            layer_type="bottleneck",
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=64,
        mask_feature_size=32,
        hidden_dim=hidden_dim,
        encoder_feedforward_dim=48,
        dim_feedforward=80,
        encoder_layers=2,
        decoder_layers=6,  # five layers, plus one for the prediction from the initial queries
        num_attention_heads=4,
        num_queries=9,
        num_labels=NUM_CLASSES,
        output_auxiliary_logits=True,
    )
    torch.manual_seed(1)
    twin = transformers.Mask2FormerForUniversalSegmentation(config)
    decoder = twin.model.transformer_module
    # Up to transformers 5.20 at least, this is a plain list, whose weights are missing from the state dict.
    if isinstance(decoder.input_projections, list):
        decoder.input_projections = nn.ModuleList(decoder.input_projections)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            # Deformable sampling starts with zero weights; noise makes every path affect the output.
            noise = torch.randn_like(parameter) * (0.3 / max(1, parameter[0].numel()) ** 0.5)
            parameter.add_(noise if "sampling_offsets" not in name else 4 * noise)
        for module in twin.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return twin.eval()


def twin_models(hidden_dim):
    decoder = dataclasses.replace(TINY.transformer_decoder, hidden_dim=hidden_dim)
    model, twin = build_model(dataclasses.replace(TINY, transformer_decoder=decoder)), hugging_face_twin(hidden_dim)
    report = load_weights(model, twin.state_dict())
    assert report.layout == "hugging_face"
    assert report.complete, report
    assert not report.unexpected, report
    return model, twin


@pytest.fixture(scope="module")
def twins():
    return twin_models(hidden_dim=64)


def all_logits(twin, images):
    output = twin(pixel_values=images)
    classes = [aux["class_queries_logits"] for aux in output.auxiliary_logits] + [output.class_queries_logits]
    masks = [aux["masks_queries_logits"] for aux in output.auxiliary_logits] + [output.masks_queries_logits]
    return torch.stack(classes), torch.stack(masks)


def relative_difference(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("size", [(64, 96), (96, 160), (32, 32), (160, 64)])
def test_every_prediction_equals_the_independent_implementation(twins, size):
    model, twin = twins
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(size[0]))
    with torch.no_grad():
        predictions = model(images)
        class_logits, mask_logits = all_logits(twin, images)
    assert predictions.class_logits.shape == class_logits.shape == (6, 2, 9, NUM_CLASSES + 1)
    torch.testing.assert_close(predictions.class_logits, class_logits, rtol=0, atol=1e-4)
    for layer in range(6):
        torch.testing.assert_close(predictions.mask_logits(layer), mask_logits[layer], rtol=0, atol=1e-4)


def test_input_projections_equal_the_independent_implementation():
    model, twin = twin_models(hidden_dim=32)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        predictions = model(images)
        class_logits, mask_logits = all_logits(twin, images)
    torch.testing.assert_close(predictions.class_logits, class_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(predictions.mask_logits(), mask_logits[-1], rtol=0, atol=1e-4)


def test_every_gradient_equals_the_independent_implementation(twins):
    # In float32, only three digits of some gradients would be correct.
    model, twin = (copy.deepcopy(module).double() for module in twins)
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0)).double()
    predictions = model(images)
    all_masks = torch.einsum("lbqc,bchw->lbqhw", predictions.mask_embeddings, predictions.mask_features)
    for source, logits in ((model, (predictions.class_logits, all_masks)), (twin, all_logits(twin, images))):
        source.zero_grad()
        sum((tensor * tensor.detach().cos()).mean() for tensor in logits).backward()
    # Gradients have the shape of weights, so the loader can rename and regroup them.
    gradients = {
        name: torch.zeros_like(tensor) if getattr(tensor, "grad", None) is None else tensor.grad
        for name, tensor in twin.state_dict(keep_vars=True).items()
    }
    expected = build_model(TINY).double()
    load_weights(expected, gradients)
    for name, parameter in model.named_parameters():
        if "key.bias" not in name:  # zero up to rounding: softmax cancels it
            # Our position embeddings stay float32 after `double()`, which limits the agreement.
            assert relative_difference(parameter.grad, expected.get_parameter(name).detach()) < 1e-6, name


def test_every_parameter_takes_part_in_every_forward():
    torch.manual_seed(0)
    model = build_model(TINY).train()
    predictions = model(torch.randn(1, 3, 64, 64))
    (predictions.class_logits.sum() + predictions.mask_logits().sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_batch_equals_its_images_one_by_one():
    torch.manual_seed(0)
    model = build_model(TINY).eval()
    images = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        batch = model(images)
        singles = [model(image[None]) for image in images]
    for index, single in enumerate(singles):
        torch.testing.assert_close(batch.class_logits[:, index], single.class_logits[:, 0], rtol=0, atol=2e-5)
        torch.testing.assert_close(batch.mask_logits()[index], single.mask_logits()[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["autocast", "parameters"])
def test_bfloat16_trains_and_is_finite(mode):
    torch.manual_seed(0)
    model, images = build_model(TINY), torch.randn(2, 3, 64, 96)
    if mode == "parameters":
        model, images = model.bfloat16(), images.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        predictions = model(images)
    assert predictions.class_logits.dtype == torch.bfloat16
    assert predictions.mask_logits().dtype == torch.float32
    (predictions.class_logits.float().square().mean() + predictions.mask_logits().square().mean()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(tensor.isfinite().all() for tensor in predictions[:3])


@pytest.mark.parametrize(
    ("mode", "tolerance"), [("float32", 0), ("float64", 1e-4), ("autocast", 0.03), ("bfloat16", 0.03)]
)
def test_a_step_through_the_criterion_trains_in_every_precision(mode, tolerance):
    """The batch has two images of different sizes, one of them padded. One image has no objects."""
    torch.manual_seed(0)
    exact, loss = build_model(TINY), LossConfig(num_points=64)
    model = copy.deepcopy(exact)
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    images = exact.normalise(pixels, torch.tensor([[64, 96], [50, 75]]))
    targets = make_targets((4, 0), size=(64, 96))
    dtype = {"autocast": torch.float32}.get(mode) or getattr(torch, mode)

    def losses(network, network_dtype, autocast):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            predictions = network.to(network_dtype)(images.to(network_dtype))
        normalizers = count_normalizers(targets, TINY.transformer_decoder.num_queries, loss)
        return compute_losses(predictions, targets, CounterPoints(seed=1), normalizers, loss, NUM_CLASSES)

    total, expected = losses(model, dtype, mode == "autocast").total, losses(exact, torch.float32, False).total
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=0)
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == dtype, name
        assert parameter.grad.isfinite().all(), name
    for child in model.children():
        assert any(parameter.grad.any() for parameter in child.parameters())


def test_the_exported_graph_gives_the_same_predictions_without_embedding_bag():
    torch.manual_seed(0)
    decoder = dataclasses.replace(TINY.transformer_decoder, num_layers=3)
    encoder = dataclasses.replace(TINY.pixel_decoder, num_layers=1)
    model = build_model(dataclasses.replace(TINY, transformer_decoder=decoder, pixel_decoder=encoder)).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        exported, eager = program.module()(images), model(images)
    operators = {str(node.target) for node in program.graph.nodes}
    assert "aten.grid_sampler.default" in operators
    assert not any("embedding_bag" in operator for operator in operators)
    for actual, expected in zip(exported, eager, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_parameter_counts_are_those_of_the_paper():
    model = build_model(ModelConfig(num_classes=133))
    millions = {
        name: sum(parameter.numel() for parameter in child.parameters()) / 1e6 for name, child in model.named_children()
    }
    assert {name: round(count, 3) for name, count in millions.items()} == {
        "backbone": 23.455,
        "pixel_decoder": 6.036,
        "transformer_decoder": 14.493,
    }
    assert sum(millions.values()) == pytest.approx(43.983878, abs=5e-7)


def test_normalise_zeroes_pixels_outside_each_image():
    model = build_model(TINY)
    images = torch.randint(0, 256, (2, 3, 8, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[8, 10], [5, 7]])
    expected = images.double()
    for channel in range(3):
        expected[:, channel] = (expected[:, channel] - TINY.pixel_mean[channel]) / TINY.pixel_std[channel]
    whole = model.normalise(images)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, expected.float(), rtol=1e-6, atol=1e-6)
    padded = model.normalise(images, sizes)
    assert torch.equal(padded[0], whole[0])
    assert torch.equal(padded[1, :, :5, :7], whole[1, :, :5, :7])
    assert padded[1, :, 5:].abs().max() == 0
    assert padded[1, :, :, 7:].abs().max() == 0


def test_a_model_in_bfloat16_normalises_in_float32():
    images = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = build_model(TINY)
    expected = model.normalise(images)
    assert torch.equal(model.bfloat16().normalise(images), expected)


def test_an_unknown_number_of_classes_is_refused():
    with pytest.raises(ConfigError, match=r"model\.num_classes"):
        build_model(dataclasses.replace(TINY, num_classes=None))
