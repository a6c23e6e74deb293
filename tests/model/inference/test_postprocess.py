"""Post-processing against the official procedure, written out at full size, one query at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from m2f.model.config import PostprocessConfig
from m2f.model.inference import mask_resize, postprocess
from m2f.model.inference.mask_resize import ImageGeometry
from m2f.model.inference.postprocess import instance, panoptic, semantic

IS_THING = (True, False, True, False, True)
CLASSES = len(IS_THING)
LOOSE = PostprocessConfig(object_threshold=0.3, overlap_threshold=0.3, max_instances=20)
GEOMETRIES = {
    "unchanged": ImageGeometry(padded_size=(64, 96), resized_size=(64, 96), original_size=(64, 96)),
    "padded and shrunk": ImageGeometry(padded_size=(64, 96), resized_size=(61, 83), original_size=(37, 51)),
    "padded and enlarged": ImageGeometry(padded_size=(64, 96), resized_size=(50, 96), original_size=(121, 233)),
    "one row": ImageGeometry(padded_size=(32, 32), resized_size=(1, 32), original_size=(1, 40)),
}


def predictions(geometry: ImageGeometry, *, queries=24, channels=6, sharpness=4.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    height, width = (s // 4 for s in geometry.padded_size)
    coarse = torch.randn(1, channels, 5, 6, generator=g)
    features = F.interpolate(coarse, (height, width), mode="bicubic")[0]
    class_logits = sharpness * torch.randn(queries, CLASSES + 1, generator=g)
    return class_logits, torch.randn(queries, channels, generator=g), features


def full_size_logits(embeddings, features, geometry: ImageGeometry):
    logits = torch.einsum("qc,chw->qhw", embeddings, features)
    logits = F.interpolate(logits[None], geometry.padded_size, mode="bilinear", align_corners=False)
    height, width = geometry.resized_size
    return F.interpolate(logits[..., :height, :width], geometry.original_size, mode="bilinear", align_corners=False)[0]


def official_panoptic(class_logits, embeddings, features, geometry, config):
    """Return the segment map, and (id, label, is_thing, score, area) of each segment."""
    masks = full_size_logits(embeddings, features, geometry).sigmoid()
    scores, labels = class_logits.softmax(-1).max(-1)
    keep = labels.ne(CLASSES) & (scores > config.object_threshold)
    segment_map = torch.zeros(geometry.original_size, dtype=torch.int32)
    segments, stuff, current = [], {}, 0
    if not keep.any():
        return segment_map, segments
    masks, scores, labels = masks[keep], scores[keep], labels[keep]
    winner = (scores[:, None, None] * masks).argmax(0)
    for k in range(len(masks)):
        label = int(labels[k])
        own, won = masks[k] >= 0.5, winner == k
        mask = own & won
        if not (own.any() and won.any() and mask.any()):
            continue
        if won.sum().item() / own.sum().item() < config.overlap_threshold:
            continue
        if not IS_THING[label] and label in stuff:
            segment_map[mask] = stuff[label]
            old = segments[stuff[label] - 1]
            segments[stuff[label] - 1] = (*old[:3], max(old[3], float(scores[k])), old[4] + int(mask.sum()))
            continue
        current += 1
        if not IS_THING[label]:
            stuff[label] = current
        segment_map[mask] = current
        segments.append((current, label, IS_THING[label], float(scores[k]), int(mask.sum())))
    return segment_map, segments


def official_instances(class_logits, embeddings, features, geometry, is_thing, config):
    """Return query, label, score and mask of each instance, by descending score, then query and label."""
    masks = full_size_logits(embeddings, features, geometry)
    scores = class_logits.softmax(-1)[:, :-1].flatten()
    found = []
    for flat in sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[: config.max_instances]:
        query, label = divmod(flat, CLASSES)
        if not is_thing[label]:
            continue
        binary = (masks[query] > 0).float()
        quality = (masks[query].sigmoid() * binary).sum() / (binary.sum() + 1e-6)
        found.append((query, label, float(scores[flat] * quality), binary.bool()))
    return sorted(found, key=lambda f: (-f[2], f[0], f[1]))


@pytest.fixture(params=[2**22, 3000], ids=["one band", "many bands"])
def band_size(request, monkeypatch):
    monkeypatch.setattr(mask_resize, "chunk_elements", lambda device: request.param)


@pytest.fixture(params=GEOMETRIES.values(), ids=GEOMETRIES)
def geometry(request):
    return request.param


@pytest.mark.usefixtures("band_size")
@pytest.mark.parametrize("seed", range(3))
def test_panoptic_results_equal_the_official_procedure(geometry, seed):
    outputs = predictions(geometry, seed=seed)
    expected_map, expected_segments = official_panoptic(*outputs, geometry, LOOSE)
    result = panoptic(*outputs, geometry, IS_THING, LOOSE)
    assert torch.equal(result.segment_map, expected_map)
    found = [(s.id, s.label, s.is_thing, pytest.approx(s.score), s.area) for s in result.segments]
    assert found == expected_segments


@pytest.mark.usefixtures("band_size")
@pytest.mark.parametrize("is_thing", [IS_THING, (True,) * CLASSES], ids=["panoptic model", "instance model"])
def test_instance_results_equal_the_official_procedure(geometry, is_thing):
    outputs = predictions(geometry)
    expected = official_instances(*outputs, geometry, is_thing, LOOSE)
    result = instance(*outputs, geometry, is_thing, LOOSE)
    assert result.labels.tolist() == [label for _, label, _, _ in expected]
    torch.testing.assert_close(result.scores, torch.tensor([score for _, _, score, _ in expected]))
    assert torch.equal(result.masks[result.mask_index], torch.stack([mask for *_, mask in expected]))
    assert len(result.masks) == len({query for query, *_ in expected})


def test_masks_of_large_images_are_streamed_in_bounded_groups(geometry, monkeypatch):
    outputs = predictions(geometry)
    whole = instance(*outputs, geometry, IS_THING, LOOSE)
    height, width = geometry.original_size
    monkeypatch.setattr(postprocess, "MASK_GROUP_BYTES", 3 * height * width + 1)
    groups = []
    ranking = postprocess.stream_instances(*outputs, geometry, IS_THING, LOOSE, groups.append)
    assert len(groups) > 2
    assert max(map(len, groups)) == 3
    assert torch.equal(torch.cat(groups), whole.masks)
    assert torch.equal(ranking.mask_index, whole.mask_index)
    assert torch.equal(ranking.labels, whole.labels)
    torch.testing.assert_close(ranking.scores, whole.scores, rtol=1e-6, atol=0)
    assert torch.equal(instance(*outputs, geometry, IS_THING, LOOSE).masks, whole.masks)


@pytest.mark.usefixtures("band_size")
def test_semantic_results_equal_the_official_procedure(geometry):
    class_logits, embeddings, features = predictions(geometry)
    masks = full_size_logits(embeddings, features, geometry).sigmoid()
    expected = torch.einsum("qk,qhw->khw", class_logits.softmax(-1)[:, :-1], masks).argmax(0)
    assert torch.equal(semantic(class_logits, embeddings, features, geometry, LOOSE).label_map, expected)


@pytest.mark.usefixtures("band_size")
def test_semantic_of_resized_class_scores_equals_official(geometry):
    class_logits, embeddings, features = predictions(geometry)
    masks = torch.einsum("qc,chw->qhw", embeddings, features)[None]
    masks = F.interpolate(masks, geometry.padded_size, mode="bilinear", align_corners=False)[0].sigmoid()
    scores = torch.einsum("qk,qhw->khw", class_logits.softmax(-1)[:, :-1], masks)
    height, width = geometry.resized_size
    cropped = scores[None, :, :height, :width]
    expected = F.interpolate(cropped, geometry.original_size, mode="bilinear", align_corners=False)[0].argmax(0)
    config = PostprocessConfig(semantic_resize="class_scores")
    label_map = semantic(class_logits, embeddings, features, geometry, config).label_map
    assert torch.equal(label_map, expected)


@pytest.mark.parametrize("geometry", [GEOMETRIES["padded and shrunk"]])
def test_panoptic_map_is_empty_if_no_query_is_kept(geometry):
    class_logits, embeddings, features = predictions(geometry)
    class_logits[:, -1] = 50
    result = panoptic(class_logits, embeddings, features, geometry, IS_THING, LOOSE)
    assert result.segment_map.shape == geometry.original_size
    assert not result.segment_map.any()
    assert result.segments == ()


def test_no_instances_if_no_thing_is_among_the_best():
    geometry = GEOMETRIES["unchanged"]
    result = instance(*predictions(geometry), geometry, (False,) * CLASSES, LOOSE)
    assert [len(t) for t in (result.masks, result.mask_index, result.labels, result.scores)] == [0, 0, 0, 0]
    assert result.masks.shape[1:] == geometry.original_size


def test_lower_query_wins_a_tie():
    geometry = GEOMETRIES["padded and shrunk"]
    class_logits, embeddings, features = (torch.cat((t, t)) if t.ndim == 2 else t for t in predictions(geometry))
    expected_map, expected_segments = official_panoptic(class_logits, embeddings, features, geometry, LOOSE)
    result = panoptic(class_logits, embeddings, features, geometry, IS_THING, LOOSE)
    assert torch.equal(result.segment_map, expected_map)
    assert len(result.segments) == len(expected_segments) > 0

    half = len(class_logits) // 2
    config = PostprocessConfig(max_instances=7)
    result = instance(class_logits, embeddings, features, geometry, (True,) * CLASSES, config)
    expected = official_instances(class_logits, embeddings, features, geometry, (True,) * CLASSES, config)
    assert result.labels.tolist() == [label for _, label, _, _ in expected]
    assert sum(query < half for query, *_ in expected) == 4  # of 7 kept, each pair starts with its lower query


@pytest.mark.parametrize("seed", range(4))
def test_stuff_is_merged_and_ids_are_unique(seed):
    geometry = GEOMETRIES["unchanged"]
    class_logits, embeddings, features = predictions(geometry, seed=seed)
    class_logits[:, -1] = -50
    config = PostprocessConfig(object_threshold=0.0, overlap_threshold=0.0)
    result = panoptic(class_logits, embeddings, features, geometry, IS_THING, config)
    ids = [s.id for s in result.segments]
    assert ids == list(range(1, len(ids) + 1))
    stuff = [s.label for s in result.segments if not s.is_thing]
    assert len(stuff) == len(set(stuff))
    areas = torch.bincount(result.segment_map.flatten(), minlength=len(ids) + 1)[1:].tolist()
    assert [s.area for s in result.segments] == areas
