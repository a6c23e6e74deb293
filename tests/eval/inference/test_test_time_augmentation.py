"""Multi-scale inference and sliding windows, compared with slow implementations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.sample import Annotation, DecodedSample, Segment
from m2f.data_pipeline.transforms.augment import resize_image
from m2f.data_pipeline.transforms.collate import EVAL_PADDING, collate_eval
from m2f.eval.config import EvaluationConfig, EvaluationSet, MultiScale, SlidingWindows
from m2f.eval.errors import EvaluationError
from m2f.eval.inference import test_time_augmentation as passes
from m2f.eval.inference.evaluator import Evaluator
from m2f.eval.inference.test_time_augmentation import predict_in_passes
from m2f.eval.inference.windows import window_starts
from m2f.eval.metrics.mean_iou import MeanIoUState
from m2f.eval.results.results import EvaluationSubject
from m2f.model.config import (
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    PostprocessConfig,
    TimmBackboneConfig,
)
from m2f.model.errors import ConfigError
from m2f.model.inference.class_scores import WindowScores
from m2f.model.mask2former import build_model
from m2f.model.structures import Predictions, SemanticResult

TABLE = CategoryTable(tuple(Category(i, f"c{i}", False, (i, i, i)) for i in range(1, 6)))
SIZE = (75, 110)


def sample_of(image_id):
    rng = np.random.default_rng(image_id)
    seg = np.kron(rng.integers(1, 6, (5, 10)), np.ones((15, 11))).astype(np.uint8)
    segments = tuple(
        Segment(
            id=i,
            category_id=i,
            is_thing=False,
            is_crowd=False,
            area=float((seg == i).sum()),
            bbox=(0.0, 0.0, 1.0, 1.0),
            source_id=i,
            map="seg",
        )
        for i in range(1, 6)
    )
    image = np.clip(seg[..., None] * 40 + rng.integers(0, 60, (*SIZE, 3)), 0, 255).astype(np.uint8)
    annotation = Annotation(seg=seg, inst=None, segments=segments)
    return DecodedSample(key=f"k{image_id}", image_id=image_id, source="made", image=image, annotation=annotation)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=TimmBackboneConfig(
            name="resnet10t", norm="group", pretrained=False, options={"channels": [16, 16, 32, 32]}
        ),
        pixel_decoder=MSDeformAttnPixelDecoderConfig(conv_dim=32, mask_dim=32, num_layers=1, num_heads=2),
        transformer_decoder=MaskedTransformerDecoderConfig(
            num_queries=12, num_layers=1, hidden_dim=32, num_heads=2, feedforward_dim=32
        ),
        num_classes=5,
    )
    return build_model(config, pretrained_backbone=False).eval()


@torch.inference_mode()
def slow_forward(model, picture):
    """Return class probabilities [Q, K] and mask logits [Q, h, w] of a picture at its own size."""
    height, width = picture.shape[:2]
    full = np.empty((-(-height // 32) * 32, -(-width // 32) * 32, 3), np.uint8)
    full[:] = EVAL_PADDING
    full[:height, :width] = picture
    images = torch.from_numpy(full).permute(2, 0, 1)[None]
    found = model(model.normalise(images, torch.tensor([[height, width]])))
    logits = torch.einsum("qc,chw->qhw", found.mask_embeddings[-1, 0], found.mask_features[0])
    logits = F.interpolate(logits[None], full.shape[:2], mode="bilinear")[0, :, :height, :width]
    return found.class_logits[-1, 0].softmax(-1)[:, :-1], logits


def slow_multi_scale(model, image, edges, max_size, flip, resize, shrink="area"):
    """Return labels [H, W]. Sizes follow Detectron2; images are mirrored after resizing, and scores are summed."""
    size, total = image.shape[:2], 0.0
    for edge in edges:
        factor = edge / min(size)
        if max(size) * factor > max_size:
            factor = max_size / max(size)
        resized = resize_image(image, (int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)), shrink)
        for mirrored in (False, True)[: 1 + flip]:
            probabilities, logits = slow_forward(model, resized[:, ::-1] if mirrored else resized)
            if resize == "masks":
                logits = F.interpolate(logits[None], size, mode="bilinear")[0]
            scores = torch.einsum("qk,qhw->khw", probabilities, logits.sigmoid())
            if resize == "class_scores":
                scores = F.interpolate(scores[None], size, mode="bilinear")[0]
            total = total + (scores.flip(-1) if mirrored else scores)
    return total.argmax(0)


def slow_window_scores(model, image, side, stride):
    """Return class scores [K, H, W], averaged over all windows that contain a pixel."""
    height, width = image.shape[:2]
    total, count = torch.zeros(5, height, width), torch.zeros(height, width)
    tops, lefts = ([*range(0, n - side, stride), n - side] if n > side else [0] for n in (height, width))
    for top in tops:
        for left in lefts:
            area = slice(top, top + side), slice(left, left + side)
            probabilities, logits = slow_forward(model, image[area])
            total[:, *area] += torch.einsum("qk,qhw->khw", probabilities, logits.sigmoid())
            count[area] += 1
    return total / count


def evaluate(model, test_time, postprocess, image_id=3, shrink="area", **options):
    sets = (EvaluationSet(dataset="val", test_time=test_time),)
    config = EvaluationConfig(tasks=("semantic",), sets=sets, shrink=shrink)
    evaluator = Evaluator(
        model, TABLE, config, model_task="semantic", postprocess=postprocess, test_time=test_time, **options
    )
    return evaluator.evaluate_batch(collate_eval([sample_of(image_id)], (0,), 64, 128))


def states_of(labels, image_id=3):
    state = MeanIoUState(5)
    state.update(image_id, sample_of(image_id).annotation.seg - 1, labels.numpy())
    return state


@pytest.mark.parametrize("resize", ["masks", "class_scores"])
@pytest.mark.parametrize(("flip", "shrink"), [(True, "area"), (False, "area"), (True, "bilinear")])
def test_multi_scale_equals_the_slow_reference(model, resize, flip, shrink):
    test_time = MultiScale(shortest_edges=(38, 75, 131), max_size=160, flip=flip)
    states = evaluate(model, test_time, PostprocessConfig(semantic_resize=resize), shrink=shrink, panel_ids=[3])
    expected = slow_multi_scale(model, sample_of(3).image, (38, 75, 131), 160, flip, resize, shrink)
    assert states.semantic is not None
    assert states.semantic.to_bytes() == states_of(expected).to_bytes()
    assert list(states.panels) == [3]


def test_multi_scale_windows_equal_the_slow_reference(model):
    image, total = sample_of(3).image, 0.0
    size = image.shape[:2]
    for edge in (48, 75):
        factor = edge / min(size)
        resized = resize_image(image, (int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)), "area")
        for mirrored in (False, True):
            scores = slow_window_scores(model, resized[:, ::-1] if mirrored else resized, 64, 40)
            scores = F.interpolate(scores[None], size, mode="bilinear")[0]
            total = total + (scores.flip(-1) if mirrored else scores)
    test_time = MultiScale(shortest_edges=(48, 75), window=64, stride=40)
    states = evaluate(model, test_time, PostprocessConfig())
    assert states.semantic is not None
    assert states.semantic.to_bytes() == states_of(total.argmax(0)).to_bytes()
    assert test_time.describe() == "2 scales, flipped too, windows of 64 every 40 pixels"


@pytest.mark.parametrize(("side", "stride"), [(64, 40), (48, 48), (256, 200)])
def test_windows_equal_the_slow_reference(model, side, stride):
    states = evaluate(model, SlidingWindows(size=side, stride=stride), PostprocessConfig())
    expected = slow_window_scores(model, sample_of(3).image, side, stride).argmax(0)
    assert states.semantic is not None
    assert states.semantic.to_bytes() == states_of(expected).to_bytes()


def test_single_window_over_a_resized_image_equals_one_whole_image_pass(model):
    config = PostprocessConfig(semantic_resize="class_scores")
    one = evaluate(model, SlidingWindows(size=512, stride=512, shortest_edge=64), config)
    whole = Evaluator(
        model, TABLE, EvaluationConfig(tasks=("semantic",)), model_task="semantic", postprocess=config
    ).evaluate_batch(collate_eval([sample_of(3)], (0,), 64, 10**6))
    assert one.to_bytes() == whole.to_bytes()


def test_windows_cover_every_pixel():
    for length in (1, 5, 64, 65, 100, 129):
        starts = window_starts(length, 64, 40)
        covered = {pixel for start in starts for pixel in range(start, min(start + 64, length))}
        assert covered == set(range(length))
        assert len(starts) == len(set(starts))
    assert window_starts(130, 64, 40) == [0, 40, 66]


def test_even_windows_cover_every_pixel_with_gaps_of_at_most_the_stride():
    for length in (1, 5, 64, 65, 100, 129, 500):
        for stride in (40, 64):
            starts = window_starts(length, 64, stride, "even")
            gaps = np.diff([*starts, max(0, length - 64)])[: len(starts) - 1]
            assert starts[0] == 0
            assert starts[-1] == max(0, length - 64)
            assert len(starts) == len(window_starts(length, 64, stride))
            assert all(0 < gap <= stride and gap - min(gaps) <= 1 for gap in gaps)


def test_even_windows_of_the_shrunken_image_equal_the_authors_of_eomt(authors_goldens: Path, monkeypatch):
    folder = authors_goldens / "eomt" / "windows_semantic"
    described = json.loads((folder / "case.json").read_text())
    inputs, outputs = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "outputs"))
    crops, scores = [], []

    def predict(images, sizes):
        logits, masks = inputs["class_logits"][len(crops)], inputs["mask_logits"][len(crops)]
        crops.append(images[0])
        return Predictions(logits[None, None], torch.eye(len(masks))[None, None], masks[None])

    def all_scores(windows, resized_size, size):
        scores.append(WindowScores(windows, resized_size, size).at(slice(0, size[0])))
        assert list(resized_size) == described["scaled_sizes"][len(scores) - 1]
        return SemanticResult(scores[-1].argmax(0))

    monkeypatch.setattr(passes, "semantic_of_windows", all_scores)
    test_time = SlidingWindows(size=32, stride=32, placement="even", shortest_edge=32)
    for index in range(4):
        image = inputs[f"image{index}"].permute(1, 2, 0).numpy()
        passes.predict_in_passes(image, test_time, predict, ["semantic"], [False], PostprocessConfig(), "bilinear")
        torch.testing.assert_close(scores[-1], outputs[f"semantic_scores_image{index}"], rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.stack(crops), outputs["crops"])
    assert window_starts(101, 32, 32, "even") == [0, 23, 46, 69]
    assert outputs["origins_image_start_end"][-4:, 1].tolist() == [0, 23, 46, 69]


class Diverged(torch.nn.Module):
    """Wrapper of a model that makes its mask features infinite or NaN."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def normalise(self, images, sizes):
        return self.model.normalise(images, sizes)

    def forward(self, images):
        predictions = self.model(images)
        return predictions._replace(mask_features=predictions.mask_features / 0)


def test_error_for_diverged_weights_names_the_image(model):
    with pytest.raises(EvaluationError, match=r"image 3 \(made\): the model's output is not finite"):
        evaluate(Diverged(model), MultiScale(shortest_edges=(64,)), PostprocessConfig())


def test_invalid_settings_are_refused():
    with pytest.raises(ConfigError, match="leaves gaps; set stride to at most size"):
        SlidingWindows(size=100, stride=101)
    with pytest.raises(ConfigError, match="window is 100 pixels and stride is 101, which leaves gaps"):
        MultiScale(window=100, stride=101)
    with pytest.raises(ConfigError, match=r"test_time\.stride is 50 pixels, but test_time\.window is not set"):
        MultiScale(stride=50)
    with pytest.raises(ConfigError, match="list at least one size, without duplicates"):
        MultiScale(shortest_edges=())
    with pytest.raises(ConfigError, match=r"'val' has test_time.kind=multi_scale.*`tasks: \[semantic\]`"):
        EvaluationConfig(sets=(EvaluationSet(dataset="val", test_time=MultiScale()),))
    for test_time in (MultiScale(), SlidingWindows()):
        EvaluationConfig(sets=(EvaluationSet(dataset="val", tasks=("semantic",), test_time=test_time),))


def test_results_name_the_test_time_settings(model):
    test_time = MultiScale(shortest_edges=(64, 96))
    states = evaluate(model, test_time, PostprocessConfig())
    subject = EvaluationSubject(dataset="val", name="val_ms", fingerprint="f" * 64, test_time=test_time.describe())
    assert states.compute(TABLE, subject).table().startswith("val_ms: 1 image, 2 scales, flipped too")


@pytest.mark.parametrize("test_time", [MultiScale(shortest_edges=(64, 80)), SlidingWindows(size=64, stride=48)])
def test_labels_do_not_depend_on_earlier_images(model, test_time):
    def predict(image, size):
        with torch.inference_mode():
            return model(model.normalise(image, size))

    image, config = sample_of(5).image, PostprocessConfig()
    passes = (predict_in_passes(image, test_time, predict, ["semantic"], [False] * 5, config) for _ in range(2))
    first, again = (found.label_map for found in passes)
    assert first is not None
    assert again is not None
    assert torch.equal(first, again)
    assert first.shape == SIZE
