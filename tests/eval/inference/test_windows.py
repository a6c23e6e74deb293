"""Panoptic and instance prediction in windows, compared with a slow merge of whole masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.sample import VOID_ID, Annotation, DecodedSample, Segment
from m2f.data_pipeline.transforms.collate import EVAL_PADDING, collate_eval
from m2f.eval.config import EvaluationConfig, EvaluationSet, MultiScale, SlidingWindows
from m2f.eval.inference.evaluator import Evaluator, detect
from m2f.eval.inference.image_output import ImageOutput
from m2f.eval.inference.test_time_augmentation import predict_in_passes
from m2f.eval.inference.windows import window_places
from m2f.eval.metrics.rle import decode_mask, encode_columns, encode_masks, mask_areas
from m2f.model.config import PostprocessConfig
from m2f.model.errors import ConfigError
from m2f.model.inference.mask_resize import ImageGeometry
from m2f.model.inference.postprocess import panoptic
from m2f.model.structures import Predictions

IS_THING = [True, True, True, False]
CONFIG = PostprocessConfig(object_threshold=0.3, overlap_threshold=0.1, max_instances=12)


def color_model(labels_of):
    """Return a model that detects objects by colour: red is the id, which `labels_of` maps to (class, confidence)."""

    def predict(images, sizes):
        ids = images[0, 0][::4, ::4].long()
        present = [i for i in ids.unique().tolist() if i in labels_of]
        count = max(1, len(present))
        logits = torch.zeros(count, len(IS_THING) + 1)
        logits[:, -1] = 5.0
        for query, i in enumerate(present):
            label, confidence = labels_of[i]
            logits[query, label], logits[query, -1] = 5.0 + confidence, 0.0
        features = torch.stack([torch.where(ids == i, 20.0, -20.0) for i in present] or [torch.full(ids.shape, -20.0)])
        return Predictions(logits[None, None], torch.eye(count)[None, None], features[None])

    return predict


def noisy_model(images, sizes):
    """Predict masks that depend on the colours, and random classes that differ between windows."""
    seed = int(images.long().sum()) % 2**31
    generator = torch.Generator().manual_seed(seed)
    small = nn.functional.avg_pool2d(images.float(), 4) / 64 - 2
    logits = 2 * torch.randn(8, len(IS_THING) + 1, generator=generator)
    embeddings = torch.randn(8, 3, generator=torch.Generator().manual_seed(7)) + 0.2 * torch.randn(
        8, 3, generator=generator
    )
    return Predictions(logits[None, None], 3 * embeddings[None, None], small)


def picture(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 255, (7, 9, 3)).astype(np.float32)
    rows, columns = np.linspace(0, 6, height), np.linspace(0, 8, width)
    smooth = np.stack(
        [
            np.array(
                [
                    np.interp(columns, np.arange(9), line)
                    for line in np.array([np.interp(rows, np.arange(7), coarse[:, c, k]) for c in range(9)]).T
                ]
            )
            for k in range(3)
        ],
        axis=-1,
    )
    return smooth.astype(np.uint8)


def slow_windows(length, size, stride):
    starts = [0]
    while starts[-1] + size < length:
        starts.append(min(starts[-1] + stride, length - size))
    return starts


def slow_output(image, top, left, side, predict):
    crop = image[top : top + side, left : left + side]
    height, width = crop.shape[:2]
    padded = np.empty((-(-height // 32) * 32, -(-width // 32) * 32, 3), np.uint8)
    padded[:] = EVAL_PADDING
    padded[:height, :width] = crop
    found = predict(torch.from_numpy(padded).permute(2, 0, 1)[None], torch.tensor([[height, width]]))
    geometry = ImageGeometry(padded.shape[:2], (height, width), (height, width))
    return ImageOutput(found.class_logits[-1, 0], found.mask_embeddings[-1, 0], found.mask_features[0], geometry)


def slow_segments(task, output):
    """Return (label, score, mask, is stuff) of every segment in one window."""
    if task == "panoptic":
        result = panoptic(*output, IS_THING, CONFIG)
        ids = result.segment_map.numpy()
        return [(s.label, s.score, ids == s.id, not s.is_thing) for s in result.segments]
    found = detect(output, IS_THING, CONFIG)
    columns = zip(found.labels.tolist(), found.scores.tolist(), found.mask_index.tolist(), strict=True)
    return [(label, score, decode_mask(found.masks[m]), False) for label, score, m in columns]


def slow_merge(task, image, side, stride, predict):
    """Return (label, score, mask [H, W]) of every segment by the rule in docs/evaluation.md, one pair at a time."""
    height, width = image.shape[:2]
    tops, lefts = slow_windows(height, side, stride), slow_windows(width, side, stride)

    def owner(starts, length, pixel):
        """Return the window whose border is farthest away, not counting the image border. Ties go to the later."""
        place = 0
        for i in range(1, len(starts)):
            before, after = starts[i], min(starts[i - 1] + side, length) - 1
            if pixel - before >= after - pixel:
                place = i
        return place

    row_owner = [owner(tops, height, y) for y in range(height)]
    column_owner = [owner(lefts, width, x) for x in range(width)]
    segments = []  # (row of windows, column of windows, label, score, whole mask, is stuff)
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            for label, score, mask, stuff in slow_segments(task, slow_output(image, top, left, side, predict)):
                whole = np.zeros((height, width), bool)
                whole[top : top + side, left : left + side] = mask
                segments.append((i, j, label, score, whole, stuff))
    group = list(range(len(segments)))

    def join(a, b):
        low, high = sorted((group[a], group[b]))
        group[:] = [low if g == high else g for g in group]

    covered = {}
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            covered[i, j] = np.zeros((height, width), bool)
            covered[i, j][top : top + side, left : left + side] = True
    places = list(covered)
    for a, one in enumerate(places):
        for other in places[a + 1 :]:
            both = covered[one] & covered[other]
            pairs = []
            for m, first in enumerate(segments):
                for n, second in enumerate(segments):
                    if first[:2] != one or second[:2] != other or first[2] != second[2] or first[5]:
                        continue
                    union = ((first[4] | second[4]) & both).sum()
                    if union and (first[4] & second[4] & both).sum() / union >= 0.5:
                        pairs.append((-(first[3] + second[3]), m, n))
            used = set()
            for _, m, n in sorted(pairs):
                if m not in used and n not in used:
                    join(m, n)
                    used |= {m, n}
    for a, first in enumerate(segments):
        for b, second in enumerate(segments):
            if first[5] and second[5] and first[2] == second[2]:
                join(a, b)
    found = []
    for g in sorted(set(group)):
        members = [s for s, of in zip(segments, group, strict=True) if of == g]
        mask = np.zeros((height, width), bool)
        for i, j, _, _, whole, _ in members:
            decided = np.array([r == i for r in row_owner])[:, None] & np.array([c == j for c in column_owner])[None]
            mask |= whole & decided
        largest = max(whole.sum() for _, _, _, _, whole, _ in members)
        if mask.any() and (members[0][5] or mask.sum() >= 0.5 * largest):
            found.append((segments[g][2], max(s[3] for s in members), mask))
    if task == "instance":
        found = sorted(found, key=lambda entry: -entry[1])[: CONFIG.max_instances]
    return found


def fast_merge(task, image, side, stride, predict, config=CONFIG, edge=None):
    windows = SlidingWindows(size=side, stride=stride, shortest_edge=edge)
    found = predict_in_passes(image, windows, predict, [task], IS_THING, config)
    if task == "panoptic":
        assert found.panoptic is not None
        ids = found.panoptic.segment_map.numpy()
        for s in found.panoptic.segments:
            assert s.area == (ids == s.id).sum()
        assert set(np.unique(ids)) - {0} == {s.id for s in found.panoptic.segments}
        return [(s.label, s.score, ids == s.id) for s in found.panoptic.segments]
    assert found.instance is not None
    columns = zip(found.instance.labels, found.instance.scores, found.instance.mask_index, strict=True)
    return [(int(label), float(score), decode_mask(found.instance.masks[m])) for label, score, m in columns]


def assert_equal(found, expected):
    assert [(label, score) for label, score, _ in found] == [(label, score) for label, score, _ in expected]
    for (_, _, one), (_, _, other) in zip(found, expected, strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("task", ["panoptic", "instance"])
@pytest.mark.parametrize(("size", "side", "stride"), [((150, 203), 64, 40), ((130, 96), 64, 20), ((50, 60), 64, 32)])
def test_merged_windows_equal_the_slow_reference(task, size, side, stride):
    with torch.inference_mode():
        for seed in range(2):
            image = picture(*size, seed)
            expected = slow_merge(task, image, side, stride, noisy_model)
            assert_equal(fast_merge(task, image, side, stride, noisy_model), expected)
            assert len(expected) > 2


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_object_across_four_windows_is_merged_into_one(task):
    image = np.zeros((96, 96, 3), np.uint8)
    image[..., 0] = 4
    image[20:76, 24:72, 0] = 1
    image[40:56, 80:96, 0] = 2
    image[40:56, 4:20, 0] = 3
    labels_of = {1: (0, 3.0), 2: (0, 2.0), 3: (1, 2.0), 4: (3, 2.0)}
    found = fast_merge(task, image, 64, 32, color_model(labels_of), PostprocessConfig(max_instances=3))
    for i, label in ((1, 0), (2, 0), (3, 1)):
        masks = [mask for found_label, _, mask in found if found_label == label and mask[image[..., 0] == i].any()]
        assert len(masks) == 1
        wrong = masks[0] ^ (image[..., 0] == i)
        assert wrong.sum() <= 0.15 * masks[0].sum()  # masks are upsampled from stride 4
    if task == "panoptic":
        assert [label for label, _, _ in found].count(3) == 1
        assert len(found) == 4


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_objects_are_resized_to_the_image(task):
    image = np.kron(picture(48, 64), np.ones((2, 2, 1))).astype(np.uint8)
    found = fast_merge(task, image, 32, 24, noisy_model, edge=48)
    small = fast_merge(task, np.ascontiguousarray(image[::2, ::2]), 32, 24, noisy_model)
    assert_equal(found, [(label, score, np.kron(mask, np.ones((2, 2), bool))) for label, score, mask in small])


def test_window_cores_partition_the_image_and_lie_inside_their_windows():
    for size, side, stride in [((100, 333), 64, 40), ((64, 64), 64, 1), ((10, 500), 64, 20), ((129, 129), 64, 63)]:
        owners = np.zeros(size, int)
        for place in window_places(size, side, stride):
            rows, columns = slice(place.core.top, place.core.bottom), slice(place.core.left, place.core.right)
            owners[rows, columns] += 1
            assert place.core.intersection(place.area) == place.core
        assert (owners == 1).all()


def test_encode_columns_equals_encoding_the_whole_mask():
    rng = np.random.default_rng(0)
    for left, width in ((0, 5), (3, 2), (0, 2), (4, 1)):
        for columns in (rng.random((6, width)) > 0.5, np.ones((6, width), bool), np.zeros((6, width), bool)):
            whole = np.zeros((6, 5), bool)
            whole[:, left : left + width] = columns
            assert encode_columns(columns, left, (6, 5)) == encode_masks([whole])[0]


def test_mask_areas_are_correct_for_more_than_255_detections():
    masks = encode_masks(np.arange(16).reshape(4, 4)[None] < np.arange(600)[:, None, None])
    assert mask_areas(masks).tolist() == [min(i, 16) for i in range(600)]


class NoisyModel(nn.Module):
    """`noisy_model` as a module."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def normalise(self, images, sizes):
        return images

    def forward(self, images):
        return noisy_model(images, None)


def test_all_tasks_are_evaluated_from_the_same_windows():
    table = CategoryTable(tuple(Category(i + 1, f"c{i}", t, (i, i, i)) for i, t in enumerate(IS_THING)))
    seg = np.kron(np.array([[1, 2], [3, VOID_ID]], np.uint8), np.ones((48, 56), np.uint8))
    segments = tuple(
        Segment(
            id=i,
            category_id=i,
            is_thing=True,
            is_crowd=False,
            area=float((seg == i).sum()),
            bbox=(0.0, 0.0, 1.0, 1.0),
            source_id=i,
            map="seg",
        )
        for i in (1, 2, 3)
    )
    annotation = Annotation(seg=seg, inst=None, segments=segments)
    sample = DecodedSample(key="k", image_id=1, source="made", image=picture(96, 112), annotation=annotation)

    def evaluate(*tasks):
        config = EvaluationConfig(tasks=tasks)
        evaluator = Evaluator(
            NoisyModel(),
            table,
            config,
            model_task="panoptic",
            postprocess=CONFIG,
            test_time=SlidingWindows(size=64, stride=32),
            panel_ids=[1],
        )
        return evaluator.evaluate_batch(collate_eval([sample], (0,), 64, 128))

    together = evaluate("panoptic", "instance", "semantic")
    assert list(together.panels) == [1]
    for task in ("panoptic", "instance", "semantic"):
        alone = getattr(evaluate(task), task)
        assert alone is not None
        assert getattr(together, task).to_bytes() == alone.to_bytes()


def test_settings_that_would_cut_objects_are_refused():
    cut = SlidingWindows(size=64, stride=64)
    with pytest.raises(ConfigError, match=r"'val' has test_time.size=64 and a stride of 64 pixels, so windows do not"):
        EvaluationConfig(sets=(EvaluationSet(dataset="val", test_time=cut),))
    with pytest.raises(ConfigError, match=r"'val' has test_time.kind=multi_scale"):
        EvaluationConfig(sets=(EvaluationSet(dataset="val"),), test_time=MultiScale())
    own = EvaluationSet(dataset="val", test_time=SlidingWindows())
    assert EvaluationConfig(test_time=MultiScale(), tasks=("semantic",)).for_set(own).test_time == SlidingWindows()
    assert EvaluationConfig(test_time=cut, tasks=("semantic",)).for_set(EvaluationSet(dataset="v")).test_time == cut
