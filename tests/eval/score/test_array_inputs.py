"""Inputs of the metrics in Python: tensors, lists, 64-bit ids, flags of things, and doubts about annotated arrays."""

import numpy as np
import pytest
import torch

from m2f.eval.errors import EvaluationError
from m2f.eval.functions import (
    Instances,
    PanopticImage,
    evaluate_instances,
    evaluate_panoptic,
    evaluate_semantic,
)

TRUTH = np.repeat([[1, 1, 1, 2], [1, 1, 1, 2], [0, 2, 2, 2]], 30, axis=1)
FOUND = np.roll(TRUTH, 6, axis=1)
FORMS = [np.asarray, np.uint64, torch.as_tensor, np.ndarray.tolist]
CLASSES = {"class_names": ["cat", "sky"], "is_thing": [True, False]}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def panoptic(truth=TRUTH, found=FOUND, areas=None, **classes):
    images = [PanopticImage(truth, {1: 0, 2: 1}, areas=areas or {})], [PanopticImage(found, {1: 0, 2: 1})]
    return evaluate_panoptic(*images, **CLASSES | classes)


@pytest.mark.parametrize("form", [*FORMS, pytest.param(lambda a: torch.as_tensor(a).cuda(), marks=needs_gpu)])
def test_maps_may_be_tensors_lists_and_of_any_integers(form):
    expected = panoptic().metrics()
    assert 0 < expected["PQ"] < 100
    assert panoptic(form(TRUTH), form(FOUND)).metrics() == panoptic(form(TRUTH)).metrics() == expected
    names = {"class_names": ["void", "cat", "sky"]}
    expected = evaluate_semantic([TRUTH], [FOUND], **names).metrics()
    assert evaluate_semantic([form(TRUTH)], [form(FOUND)], **names).metrics() == expected


def test_ids_of_64_bits_are_kept_apart():
    far = np.where(TRUTH == 1, np.uint64(2**63 + 1), np.where(TRUTH == 2, np.uint64(2**63 + 2), np.uint64(0)))
    truth = [PanopticImage(far, {2**63 + 1: 0, 2**63 + 2: 1})]
    found = [PanopticImage(FOUND, {1: 0, 2: 1})]
    assert evaluate_panoptic(truth, found, **CLASSES).metrics() == panoptic().metrics()


def test_instances_may_be_tensors_and_lists():
    masks = np.stack([TRUTH == 1, TRUTH == 2])
    scores = np.array([0.75, 0.5])

    def evaluate(form, list_of_masks=False):
        given = [form(mask) for mask in masks] if list_of_masks else form(masks)
        truth = Instances(given, form(np.array([0, 1])), is_crowd=form(np.array([False, True])))
        found = Instances(given, form(np.array([0, 1])), form(scores))
        return evaluate_instances([truth], [found], class_names=["cat", "sky"]).metrics()

    expected = evaluate(np.asarray)
    assert evaluate(torch.as_tensor) == evaluate(torch.as_tensor, list_of_masks=True) == expected
    scores = torch.tensor(scores, dtype=torch.bfloat16, requires_grad=True)
    found = Instances(masks, [torch.tensor(0), torch.tensor(1)], scores)
    assert found.scores.tolist() == [0.75, 0.5]
    assert found.labels.tolist() == [0, 1]


def test_what_is_not_an_array_is_refused():
    with pytest.raises(EvaluationError, match="id_map is not an array of numbers"):
        PanopticImage([[1, 2], [3]], {})
    with pytest.raises(EvaluationError, match="image 0: the prediction is not an array of numbers"):
        evaluate_semantic([TRUTH], [[[1, 2], [3]]], class_names=["a"] * 3)
    polygon = Instances([[[1, 2, 3, 4, 5, 6]]], [0])
    with pytest.raises(
        EvaluationError, match=r"image 0: mask 0 is \[\[1, 2, 3.*; it must be bool \[H, W\], or COCO's run"
    ):
        evaluate_instances([polygon], [Instances([], [], [])], class_names=["cat"])


@pytest.mark.parametrize("is_thing", [{1: False, 0: True}, np.array([True, False]), (1, 0), torch.tensor([1, 0])])
def test_flags_of_things_may_be_listed_or_given_by_label(is_thing):
    results = panoptic(class_names={1: "sky", 0: "cat"}, is_thing=is_thing)
    assert results.metrics() == panoptic().metrics()
    assert results.to_json() == panoptic().to_json()


@pytest.mark.parametrize(
    ("is_thing", "message"),
    [
        ({1: True, 2: False}, r"is_thing has the labels \[1, 2\]; they must be 0 to 1"),
        ({True, False}, "is_thing is {False, True}; give a list with True or False for each class"),
        (["thing", "stuff"], r"is_thing is \['thing', 'stuff'\]; give a list"),
        ([True, None], r"is_thing is \[True, None\]; give a list"),
        (True, "is_thing is True; give a list"),
        ([True], "2 names and 1 values of is_thing"),
    ],
)
def test_values_that_are_not_flags_of_things_are_refused(is_thing, message):
    with pytest.raises(EvaluationError, match=message):
        panoptic(is_thing=is_thing)


def test_doubts_about_annotated_arrays_are_warnings():
    with pytest.raises(
        EvaluationError, match="image 0: segment 1 of the truth has 180 pixels, but states an area of 1"
    ):
        panoptic(areas={1: 1})
    with pytest.raises(EvaluationError, match="image 0: areas states inf for segment 1"):
        panoptic(areas={1: float("inf")})
    with pytest.warns(UserWarning, match=r"DOUBTFUL TRUTH \(1 image checked\): 2 of 2 annotated segments have less"):
        assert panoptic(areas={1: 720, 2: 600}).metrics()["PQ"] == 0
    with pytest.warns(UserWarning, match=r"SQ is above 100 % \(cat\)"):
        panoptic(found=TRUTH, areas={1: 179})
    masks = np.stack([TRUTH == 1, TRUTH == 5])
    truth = Instances(masks, [0, 0], areas=[0.02, 0])
    with (
        pytest.warns(UserWarning, match="1 of 2 annotated segments have less than half"),
        pytest.warns(UserWarning, match="1 of 2 annotated segments have no pixel"),
    ):
        evaluate_instances([truth], [Instances(masks[:1], [0], [0.5])], class_names=["cat"])
