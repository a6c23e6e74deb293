"""Attention shares of synthetic maps on a synthetic image, and their pictures."""

import numpy as np
import pytest
import torch

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.sample import Annotation, DecodedSample, Segment
from m2f.data_pipeline.transforms.collate import collate_eval
from m2f.eval.inference.attention import AttentionMass, MatchedObjects, attention_pictures, matched_objects
from m2f.eval.report.panels import decode_picture, render_heat_maps
from m2f.model.analysis.attention_maps import AttentionMap
from m2f.model.config import LossConfig
from m2f.model.structures import Predictions

TABLE = CategoryTable((Category(5, "left", False, (0, 0, 0)), Category(6, "right", True, (0, 0, 0))))
LABELS = TABLE.labels("panoptic")
HEIGHT, WIDTH = 60, 96  # padded to 64 x 96


def halves(ids=(1, 2)):
    """Return a sample whose left third is stuff and whose rest is a thing. Only segments in `ids` are annotated."""
    seg = np.zeros((HEIGHT, WIDTH), np.uint8)
    seg[:, :32], seg[:, 32:] = 1, 2
    segments = tuple(
        Segment(
            id=i,
            category_id=4 + i,
            is_thing=i == 2,
            is_crowd=False,
            area=float((seg == i).sum()),
            bbox=(0.0, 0.0, 1.0, 1.0),
            source_id=i,
            map="seg",
        )
        for i in ids
    )
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    annotation = Annotation(seg=np.where(np.isin(seg, ids), seg, 0), inst=None, segments=segments)
    return DecodedSample(key="k", image_id=9, source="made", image=image, annotation=annotation)


def batch_of(sample):
    return collate_eval([sample], (0,), HEIGHT, 4096)


def predictions():
    """Return two layers. The first predicts nothing; in the last, query 2 is the left third and query 0 the rest."""
    left = torch.full((16, 24), -9.0)
    left[:, :8] = 9.0
    embeddings = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    class_logits = torch.tensor([[-9.0, 9.0, -9.0], [-9.0, -9.0, 9.0], [9.0, -9.0, -9.0]])
    features = torch.stack([left, torch.zeros_like(left)])[None]
    both = torch.stack([torch.zeros_like(embeddings), embeddings])[:, None]
    return Predictions(torch.stack([torch.zeros_like(class_logits), class_logits])[:, None], both, features)


def test_objects_are_matched_with_the_queries_of_the_last_layer():
    objects = matched_objects(batch_of(halves()), 0, predictions(), "panoptic", LABELS, LossConfig())
    assert dict(zip(objects.labels.tolist(), objects.queries.tolist(), strict=True)) == {0: 2, 1: 0}
    assert objects.masks.shape == (2, 64, 96)
    areas = dict(zip(objects.labels.tolist(), objects.masks.sum((1, 2)).tolist(), strict=True))
    assert areas == {0: HEIGHT * 32, 1: HEIGHT * 64}
    assert not objects.masks[:, HEIGHT:].any()


def test_matching_on_whole_masks_is_supported():
    objects = matched_objects(
        batch_of(halves()), 0, predictions(), "panoptic", LABELS, LossConfig(matching="masks", mask_loss="focal")
    )
    assert objects.queries[objects.labels == 1].tolist() == [0]


def test_an_image_without_objects_adds_nothing():
    objects = matched_objects(batch_of(halves(ids=())), 0, predictions(), "panoptic", LABELS, LossConfig())
    assert len(objects.queries) == 0
    mass = AttentionMass()
    mass.update([AttentionMap(1, (32,), ((2, 3),), torch.full((1, 3, 6), 1 / 6))], 0, objects)
    assert mass.by_layer == {1: None}
    assert mass.by_level == {"1/32": None, "average": None}
    assert "-" in mass.table()


def maps_of(*weights):
    """Return one map per argument: layers 1 and 3 at 1/32 (2 x 3 pixels), layer 2 at 1/16 (4 x 6 pixels)."""
    shapes = [(2, 3), (4, 6), (2, 3)]
    return [
        AttentionMap(layer, (96 // shape[1],), (shape,), row[None])
        for layer, (shape, row) in enumerate(zip(shapes, weights, strict=True), start=1)
    ]


def test_shares_are_means_over_objects_then_layers_of_a_level():
    masks = torch.zeros(2, 64, 96, dtype=torch.bool)
    masks[0, :, :32] = True  # the first column at 1/32
    masks[1, :32] = True  # the upper half
    objects = MatchedObjects(torch.tensor([0, 1]), torch.tensor([0, 1]), masks)
    uniform, inside = torch.full((2, 6), 1 / 6), torch.zeros(2, 6)
    inside[:, 0] = 1.0  # all attention is on the upper left pixel
    mass = AttentionMass()
    mass.update(maps_of(uniform, torch.full((2, 24), 1 / 24), inside), 0, objects)
    assert mass.by_layer == pytest.approx({1: (1 / 3 + 1 / 2) / 2, 2: (1 / 3 + 1 / 2) / 2, 3: 1.0})
    levels = mass.by_level
    assert levels == pytest.approx({"1/32": (5 / 12 + 1) / 2, "1/16": 5 / 12, "average": (5 / 12 + 5 / 12 + 1) / 3})
    assert [line.split()[-2:] for line in mass.table().splitlines()[2:5]] == [
        ["41.67", "58.33"],
        ["41.67", "58.33"],
        ["100.00", "0.00"],
    ]


def test_pictures_show_the_last_layer_of_every_level_without_the_padding():
    first, last = torch.zeros(1, 6), torch.zeros(1, 6)
    first[0, 0] = last[0, 5] = 1.0
    heats = attention_pictures(maps_of(first, torch.full((1, 24), 1 / 24), last), 0, 0, (HEIGHT, WIDTH))
    assert [heat.title for heat in heats] == ["layer 3, 1/32", "layer 2, 1/16"]
    assert heats[0].values.shape == (HEIGHT, WIDTH)
    assert np.array_equal(heats[0].values.nonzero(), np.nonzero(heats[0].values[:, :] == 1))
    assert heats[0].values[32:, 64:].all()
    assert heats[0].values.sum() == 28 * 32

    outline = np.zeros((HEIGHT, WIDTH), bool)
    outline[20:40, 20:40] = True
    png = render_heat_maps(np.full((HEIGHT, WIDTH, 3), 100, np.uint8), outline, "image 9", heats)
    column = (decode_picture(png).shape[1] - 2 * 8) // 3
    hot, cold = decode_picture(png)[-20, 2 * column - 20 + 8], decode_picture(png)[60, column + 30]
    assert hot.mean() > 120 > cold.mean()
