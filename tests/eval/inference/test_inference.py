"""The evaluator with a perfect model, a diverged one and a real one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.sample import Annotation, DecodedSample, Segment
from m2f.data_pipeline.transforms.collate import collate_eval
from m2f.eval.config import EvaluationConfig
from m2f.eval.errors import EvaluationError
from m2f.eval.inference.evaluator import Evaluator, check_tasks, detect
from m2f.eval.inference.image_output import ImageOutput
from m2f.eval.report.panels import decode_picture
from m2f.eval.results.results import EvaluationSubject
from m2f.eval.results.states import EvaluationStates, check_complete
from m2f.model.config import (
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    PostprocessConfig,
    TimmBackboneConfig,
)
from m2f.model.errors import ConfigError
from m2f.model.inference import postprocess
from m2f.model.inference.mask_resize import ImageGeometry, MaskResize
from m2f.model.inference.postprocess import panoptic
from m2f.model.mask2former import build_model
from m2f.model.structures import Predictions

TABLE = CategoryTable(
    (
        Category(4, "sea", False, (0, 80, 200)),
        Category(11, "boat", True, (220, 30, 30)),
        Category(9, "sky", False, (120, 180, 240)),
        Category(2, "buoy", True, (240, 200, 0)),
    )
)
TASKS = ("panoptic", "instance", "semantic")
SUBJECT = EvaluationSubject(dataset="harbour", fingerprint="f" * 64)
BOXES = {1: (0, 32, 0, 96), 2: (32, 64, 0, 96), 3: (16, 40, 8, 40), 4: (20, 48, 56, 88), 5: (48, 60, 12, 24)}
CATEGORY_OF = {1: 9, 2: 4, 3: 11, 4: 11, 5: 2}


def harbour(image_id, seed=0):
    """Return a sample of 64 x 96 pixels. Segment corners are multiples of 4, so masks of stride 4 can be exact."""
    seg = np.zeros((64, 96), np.uint8)
    for i, (top, bottom, left, right) in BOXES.items():
        seg[top:bottom, left:right] = i
    image = np.random.default_rng(seed).integers(0, 256, (64, 96, 3)).astype(np.uint8) // 4 + seg[..., None] * 30
    segments = tuple(
        Segment(
            id=i,
            category_id=category,
            is_thing=TABLE.by_id[category].is_thing,
            is_crowd=False,
            area=float((seg == i).sum()),
            bbox=(0.0, 0.0, 1.0, 1.0),
            source_id=i,
            map="seg",
        )
        for i, category in CATEGORY_OF.items()
    )
    annotation = Annotation(seg=seg, inst=None, segments=segments)
    return DecodedSample(key=f"k{image_id}", image_id=image_id, source="made", image=image, annotation=annotation)


class Oracle(nn.Module):
    """Model that predicts the harbour exactly, with one query per segment and one without an object."""

    def __init__(self, task="panoptic", scale=1):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.task, self.scale, self.calls = task, scale, 0

    def normalise(self, images, sizes):
        return images.float()

    def forward(self, images):
        self.calls += 1
        batch, _, height, width = images.shape
        labels = TABLE.labels(self.task)
        shown = [i for i in BOXES if CATEGORY_OF[i] in labels]
        class_logits = torch.full((1, batch, len(shown) + 1, len(labels) + 1), -8.0)
        features = torch.full((batch, len(shown) + 1, height // 4, width // 4), -8.0)
        seg = torch.from_numpy(harbour(0).annotation.seg)[::4, ::4].repeat_interleave(self.scale, 0)
        seg = seg.repeat_interleave(self.scale, 1)
        for query, i in enumerate(shown):
            class_logits[0, :, query, labels[CATEGORY_OF[i]]] = 8.0
            features[:, query, : seg.shape[0], : seg.shape[1]][:, seg == i] = 8.0
        class_logits[0, :, -1, -1] = 8.0
        return Predictions(class_logits, torch.eye(len(shown) + 1).expand(1, batch, -1, -1), features)


def evaluator_of(model, tasks=TASKS, task="panoptic", **options):
    config = EvaluationConfig(tasks=tasks)
    return Evaluator(model, TABLE, config, model_task=task, postprocess=PostprocessConfig(), **options)


def batch_of(*image_ids, shortest_edge=64):
    return collate_eval([harbour(i) for i in image_ids], tuple(range(len(image_ids))), shortest_edge, 4096)


def test_perfect_panoptic_model_is_perfect_in_all_tasks_in_one_pass():
    model = Oracle()
    states = evaluator_of(model, panel_ids=[7]).evaluate_batch(batch_of(7, 5))
    results = states.compute(TABLE, SUBJECT)
    assert model.calls == 1
    check_complete(states, [5, 7])
    metrics = results.metrics()
    assert [metrics[name] for name in ("RQ", "RQ_th", "RQ_st", "AP")] == pytest.approx([100.0] * 4)
    assert all(98 < (metrics[name] or 0) < 100 for name in ("PQ", "mIoU", "pACC"))  # upsampling rounds corners
    assert list(states.panels) == [7]
    assert decode_picture(states.panels[7]).shape[1] > 3 * 500


def test_panel_title_is_the_image_file_name(monkeypatch):
    names = []
    monkeypatch.setattr("m2f.eval.inference.evaluator.render_panel", lambda image, name, *_: names.append(name) or b"")
    evaluator_of(Oracle(), panel_ids=[7]).evaluate_batch(batch_of(7, 5))
    assert names == [f"{harbour(7).key}.jpg"]


def test_padding_and_resizing_are_undone():
    model = Oracle(scale=2)
    batch = collate_eval([harbour(1)], (0,), 128, 4096)
    assert batch.images.shape[-2:] == (128, 192)
    results = evaluator_of(model).evaluate_batch(batch).compute(TABLE, SUBJECT)
    assert results.metrics()["PQ"] == pytest.approx(100.0, abs=2)


@pytest.mark.parametrize(("task", "metric"), [("instance", "AP"), ("semantic", "mIoU")])
def test_models_of_one_task_have_the_classes_of_that_task(task, metric):
    states = evaluator_of(Oracle(task), tasks=(task,), task=task, panel_ids=[3]).evaluate_batch(batch_of(3))
    assert states.compute(TABLE, SUBJECT).metrics()[metric] == pytest.approx(100.0, abs=2)
    assert set(states.panels) == {3}


def test_results_are_bit_identical_for_any_batching():
    evaluator = evaluator_of(Oracle(), panel_ids=[1, 2])
    together = evaluator.evaluate_batch(batch_of(1, 2, 3))
    merged = EvaluationStates.empty(TABLE, TASKS)
    for image_id in (3, 1, 2, 1):
        merged.merge(EvaluationStates.from_bytes(evaluator.evaluate_batch(batch_of(image_id)).to_bytes()))
    assert merged.to_bytes() == together.to_bytes()


def test_tasks_that_a_model_does_not_predict_are_refused():
    check_tasks("panoptic", TASKS)
    with pytest.raises(ConfigError, match=r"trained for 'instance' can be evaluated on \['instance'\]"):
        check_tasks("instance", ("panoptic",))
    with pytest.raises(ConfigError, match=r"evaluation.tasks is \[\]"):
        evaluator_of(Oracle(), tasks=())


def test_error_for_diverged_weights_names_the_image():
    class Diverged(Oracle):
        def forward(self, images):
            predictions = super().forward(images)
            return predictions._replace(mask_features=predictions.mask_features / 0 * 0)

    with pytest.raises(EvaluationError, match=r"image 6 \(made\): the model's output is not finite"):
        evaluator_of(Diverged()).evaluate_batch(batch_of(6))


def test_model_with_a_different_number_of_classes_is_refused():
    with pytest.raises(EvaluationError, match="the model has 2 classes, but 4 are expected"):
        evaluator_of(Oracle("instance")).evaluate_batch(batch_of(1))


def test_a_real_model_with_random_weights_is_evaluated_deterministically():
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=TimmBackboneConfig(name="resnet18", norm="group"),
        pixel_decoder=MSDeformAttnPixelDecoderConfig(conv_dim=32, mask_dim=32, num_layers=1, num_heads=4),
        transformer_decoder=MaskedTransformerDecoderConfig(
            num_queries=8, num_layers=1, hidden_dim=32, num_heads=4, feedforward_dim=32
        ),
        num_classes=4,
    )
    evaluator = evaluator_of(build_model(config, pretrained_backbone=False))
    first, again = (evaluator.evaluate_batch(batch_of(1)) for _ in range(2))
    assert first.to_bytes() == again.to_bytes()
    content = json.loads(first.compute(TABLE, SUBJECT).to_json())
    assert content["metrics"]["PQ"] < 50


def test_square_images_and_panoptic_results_equal_those_of_the_authors_of_eomt(authors_goldens: Path):
    folder = authors_goldens / "eomt" / "panoptic_postprocess"
    described = json.loads((folder / "case.json").read_text())
    inputs, outputs = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "outputs"))
    side, classes = described["img_size"][0], described["num_classes"]
    is_thing = [label not in described["stuff_classes"] for label in range(classes)]
    for index in range(2):
        image = inputs[f"image{index}"].permute(1, 2, 0).numpy()
        sample = DecodedSample(key="k", image_id=1, source="made", image=image, annotation=None)  # type: ignore[arg-type]
        batch = collate_eval([sample], [0], side, side, "bilinear", square=True)
        height, width = batch.sizes[0].tolist()
        padded = outputs["padded_images"][index]
        assert batch.images[0].shape == padded.shape
        # The authors pad with black, m2f with the mean colour.
        assert torch.equal(batch.images[0, :, :height, :width], padded[:, :height, :width])
        geometry = ImageGeometry((side, side), (height, width), image.shape[:2])
        masks = inputs["mask_logits"][index]
        output = ImageOutput(inputs["class_logits"][index], torch.eye(len(masks)), masks, geometry)
        resized = MaskResize(*output[1:]).original(slice(0, image.shape[0]))
        torch.testing.assert_close(resized, outputs[f"mask_logits_reverted_image{index}"], rtol=1e-5, atol=1e-5)
        found = panoptic(*output, is_thing, PostprocessConfig())  # thresholds of 0.8, as the authors'
        theirs = outputs[f"class_and_segment_image{index}"].long()
        labels = torch.full_like(theirs[..., 0], described["void_class_id"])
        for segment in found.segments:
            labels[found.segment_map == segment.id] = segment.label
        assert torch.equal(labels, theirs[..., 0])
        pairs = torch.stack((found.segment_map.long(), theirs[..., 1]), -1).flatten(0, 1).unique(dim=0)
        assert len(found.segments) >= 2
        assert len(pairs) == len(pairs[:, 0].unique()) == len(pairs[:, 1].unique()) == 1 + len(found.segments)


def test_masks_are_encoded_while_the_next_group_is_computed(monkeypatch):
    events = []

    class Copy:
        was_needed = True  # as on a GPU

        def __init__(self, group):
            self.group = group
            events.append("start")

        def wait(self):
            events.append("wait")
            return self.group

    torch.manual_seed(0)
    output = ImageOutput(
        torch.randn(3, 2), torch.randn(3, 4), torch.randn(4, 8, 8), ImageGeometry((32, 32), (32, 32), (32, 32))
    )
    expected = detect(output, (True,), PostprocessConfig())
    monkeypatch.setattr("m2f.eval.inference.evaluator.ResultCopy", Copy)
    monkeypatch.setattr(postprocess, "MASK_GROUP_BYTES", 1)
    found = detect(output, (True,), PostprocessConfig())
    assert events == ["start", "start", "wait", "start", "wait", "wait"]
    assert found.masks == expected.masks
    assert np.array_equal(found.scores, expected.scores)
