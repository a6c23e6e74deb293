"""Class scores averaged over views and windows, against a slow reference that sums all scores at full size."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F

from m2f.model.inference import mask_resize
from m2f.model.inference.class_scores import ClassScores, View, Window, semantic_of_views, semantic_of_windows
from m2f.model.inference.mask_resize import ImageGeometry

CLASSES, QUERIES, CHANNELS = 5, 12, 6
ORIGINAL = (61, 83)


def padded(size):
    return tuple(-(-side // 32) * 32 for side in size)


def prediction(resized, original, seed):
    g = torch.Generator().manual_seed(seed)
    geometry = ImageGeometry(padded(resized), resized, original)
    coarse = torch.randn(1, CHANNELS, 5, 6, generator=g)
    features = F.interpolate(coarse, tuple(side // 4 for side in geometry.padded_size), mode="bicubic")[0]
    class_logits = 3 * torch.randn(QUERIES, CLASSES + 1, generator=g)
    return class_logits, torch.randn(QUERIES, CHANNELS, generator=g), features, geometry


def slow_input_scores(class_logits, embeddings, features, geometry):
    """Return class scores [K, h, w] at the resized input size, without padding."""
    logits = torch.einsum("qc,chw->qhw", embeddings, features)
    logits = F.interpolate(logits[None], geometry.padded_size, mode="bilinear")[0]
    height, width = geometry.resized_size
    masks = logits[:, :height, :width].sigmoid()
    return torch.einsum("qk,qhw->khw", class_logits.softmax(-1)[:, :-1], masks)


def slow_scores(class_logits, embeddings, features, geometry, resize):
    """Return class scores [K, H, W] at the original size."""
    if resize == "class_scores":
        scores = slow_input_scores(class_logits, embeddings, features, geometry)
        return F.interpolate(scores[None], geometry.original_size, mode="bilinear")[0]
    logits = torch.einsum("qc,chw->qhw", embeddings, features)
    logits = F.interpolate(logits[None], geometry.padded_size, mode="bilinear")[0]
    height, width = geometry.resized_size
    masks = F.interpolate(logits[None, :, :height, :width], geometry.original_size, mode="bilinear")[0].sigmoid()
    return torch.einsum("qk,qhw->khw", class_logits.softmax(-1)[:, :-1], masks)


@pytest.fixture(params=[2**22, 3000], ids=["one band", "many bands"])
def band_size(request, monkeypatch):
    monkeypatch.setattr(mask_resize, "chunk_elements", lambda device: request.param)


@pytest.mark.usefixtures("band_size")
@pytest.mark.parametrize("resize", ["masks", "class_scores"])
@pytest.mark.parametrize("seed", range(3))
def test_semantic_of_views_equals_the_argmax_of_summed_scores(resize, seed):
    views, total = [], torch.zeros(CLASSES, *ORIGINAL)
    for i, resized in enumerate([(31, 42), (61, 83), (107, 145)]):
        for mirrored in (False, True):
            parts = prediction(resized, ORIGINAL, 100 * seed + 2 * i + mirrored)
            views.append(View(ClassScores(*parts, resize), mirrored))
            scores = slow_scores(*parts, resize)
            total += scores.flip(-1) if mirrored else scores
    assert torch.equal(semantic_of_views(views, ORIGINAL).label_map, total.argmax(0))


def windows_of(size, side, stride, seed):
    """Yield top, left and prediction of each window, row by row."""
    tops, lefts = (sorted({*range(0, max(1, length - side), stride), max(0, length - side)}) for length in size)
    for number, (top, left) in enumerate((top, left) for top in tops for left in lefts):
        shape = min(side, size[0]), min(side, size[1])
        yield top, left, prediction(shape, shape, seed + number)


@pytest.mark.usefixtures("band_size")
@pytest.mark.parametrize("original", [(64, 96), (37, 51), (150, 233)], ids=["same", "smaller", "larger"])
@pytest.mark.parametrize(("side", "stride"), [(40, 24), (40, 40), (200, 100)])
def test_semantic_of_windows_equals_the_argmax_of_mean_scores(original, side, stride):
    size = (64, 96)
    total, count = torch.zeros(CLASSES, *size), torch.zeros(size)
    windows = []
    for top, left, parts in windows_of(size, side, stride, seed=7):
        scores = slow_input_scores(*parts)
        area = slice(top, top + scores.shape[1]), slice(left, left + scores.shape[2])
        total[:, *area] += scores
        count[area] += 1
        windows.append(Window(top, left, ClassScores(*parts, "class_scores")))
    assert int(count.min()) >= 1
    mean = F.interpolate((total / count)[None], original, mode="bilinear")[0]
    found = semantic_of_windows(iter(windows), size, original).label_map
    assert torch.equal(found, mean.argmax(0))


def test_only_two_rows_of_windows_are_held_in_memory(monkeypatch):
    monkeypatch.setattr(mask_resize, "chunk_elements", lambda device: 3000)
    alive: weakref.WeakSet[ClassScores] = weakref.WeakSet()
    most = 0

    def windows():
        nonlocal most
        for top, left, parts in windows_of((400, 64), 32, 32, seed=3):
            scores = ClassScores(*parts, "class_scores")
            alive.add(scores)
            most = max(most, len(alive))
            yield Window(top, left, scores)

    semantic_of_windows(windows(), (400, 64), (400, 64))
    assert most <= 2 * 2 + 1  # two rows of two windows, and the next window
