"""Inputs of the metrics in Python: tensors, lists, 64-bit ids, flags of things, and doubts about annotated arrays."""

import re

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


def panoptic_of(side, **fields):
    """Evaluate with changed fields of one side."""
    images = {"truth": (TRUTH, {1: 0, 2: 1}), "prediction": (FOUND, {1: 0, 2: 1})}
    given = {name: {"id_map": ids, "labels": labels} for name, (ids, labels) in images.items()}
    given[side] |= fields
    return evaluate_panoptic([PanopticImage(**given["truth"])], [PanopticImage(**given["prediction"])], **CLASSES)


@pytest.mark.parametrize("side", ["truth", "prediction"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": {1: 0.5, 2: 1}}, "labels has 0.5 for segment 1; give whole numbers"),
        ({"labels": {1: "0", 2: 1}}, "labels has '0' for segment 1"),
        ({"labels": {1: float("nan"), 2: 1}}, "labels has nan for segment 1"),
        ({"labels": {"1": 0, "2": 1}}, "labels has '1', which is not a segment id"),
        ({"labels": [0, 0, 1]}, r"labels is \[0, 0, 1\]; give a mapping from segment ids"),
        ({"labels": None}, "labels is None; give a mapping"),
        ({"crowds": [True, False]}, "crowds has True, which is not a segment id"),
        ({"crowds": np.array([False, True])}, "crowds has False, which is not a segment id"),
        ({"crowds": ["1"]}, "crowds has '1', which is not a segment id"),
        ({"crowds": [9]}, "crowds has the id 9, which labels does not have"),
        ({"crowds": [0, 1]}, "crowds has the id 0, which labels does not have"),
        ({"crowds": {1: False}}, r"crowds is {1: False}; give a list of segment ids"),
        ({"crowds": None}, "crowds is None; give a list"),
        ({"crowds": 1}, "crowds is 1; give a list"),
        ({"areas": {"1": 220.0}}, "areas has '1', which is not a segment id"),
        ({"areas": {9: 220.0}}, "areas has the id 9, which labels does not have"),
        ({"areas": {1: "a"}}, "areas states 'a' for segment 1"),
        ({"areas": {1: None}}, "areas states None for segment 1"),
        ({"areas": {1: True}}, "areas states True for segment 1"),
        ({"areas": {1: 10**400}}, "areas states 10000"),
        ({"areas": None}, "areas is None; give a mapping"),
        ({"id_map": np.stack([TRUTH] * 3, -1)}, r"is a int64 map of shape \[3, 120, 3\]; it must be integers \[H, W\]"),
    ],
)
def test_fields_of_panoptic_images_of_another_kind_are_refused(side, fields, message):
    with pytest.raises(EvaluationError, match=f"image 0: the {side}:? {message}"):
        panoptic_of(side, **fields)


def test_whole_numbers_of_any_type_are_ids_labels_and_areas():
    expected = panoptic_of("truth", crowds=[2], areas={1: 180}).metrics()
    for crowds in ({2}, np.array([2]), torch.tensor([2]), [2.0], dict.fromkeys([2]).keys()):
        fields = {"labels": {1.0: np.uint8(0), np.int64(2): True}, "areas": {np.int32(1): torch.tensor(180.0)}}
        assert panoptic_of("truth", crowds=crowds, **fields).metrics() == expected
    void = {"labels": {0: None, 1: 0, 2: 1}, "crowds": [0, 2], "areas": {0: None, 1: 180}}
    assert panoptic_of("truth", **void).metrics() == expected


MASKS = np.stack([TRUTH == 1, TRUTH == 2])
RUNS = {"size": [3, 120], "counts": [0, 360]}


def instances_of(side, **fields):
    """Evaluate with changed fields of one side."""
    given = {"truth": {"masks": MASKS, "labels": [0, 1]}}
    given["prediction"] = given["truth"] | {"scores": [0.9, 0.8]}
    given[side] = given[side] | fields
    images = [Instances(**given["truth"])], [Instances(**given["prediction"])]
    return evaluate_instances(*images, class_names=["cat", "sky"])


@pytest.mark.parametrize("side", ["truth", "prediction"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": [0, 1.9]}, ": labels has 1.9 for mask 1; give whole numbers"),
        ({"labels": [float("nan"), 1]}, ": labels has nan for mask 0"),
        ({"labels": ["0", "1"]}, r": labels is \['0', '1'\]; give one number per mask"),
        ({"labels": [None, 1]}, r": labels is \[None, 1\]"),
        ({"labels": [[0], [1]]}, r": labels is \[\[0\], \[1\]\]"),
        ({"labels": [2**70, 1]}, r": labels is \[1180591620717411303424, 1\]"),
        ({"labels": 3}, ": labels is 3"),
        ({"labels": None}, ": labels is None"),
        ({"labels": [0]}, ": labels has 1 entries for 2 masks"),
        ({"scores": ["a", "b"]}, r": scores is \['a', 'b'\]"),
        ({"scores": [[0.9], [0.8]]}, r": scores is \[\[0.9\], \[0.8\]\]"),
        ({"scores": 0.5}, ": scores is 0.5"),
        ({"is_crowd": ["0", "false"]}, r": is_crowd is \['0', 'false'\]"),
        ({"is_crowd": [0, 2]}, ": is_crowd has 2 for mask 1; give 0, 1, True or False"),
        ({"is_crowd": [float("nan"), 0]}, ": is_crowd has nan for mask 0"),
        ({"is_crowd": [[0], [0]]}, r": is_crowd is \[\[0\], \[0\]\]"),
        ({"areas": ["a", 1]}, r": areas is \['a', '1'\]"),
        ({"masks": None}, r": masks is None; give an array \[N, H, W\] or a list of masks"),
        ({"masks": (mask for mask in MASKS)}, ": masks is <generator"),
    ],
)
def test_fields_of_instances_of_another_kind_are_refused(side, fields, message):
    with pytest.raises(EvaluationError, match=f"image 0: the {side}{message}"):
        instances_of(side, **fields)


@pytest.mark.parametrize("side", ["truth", "prediction"])
@pytest.mark.parametrize("size", ["ab", [20], [-3, -120], [3.7, 120.2], [0, 0], None])
def test_sizes_of_run_lengths_must_be_two_whole_numbers_above_0(side, size):
    message = f"image 0: mask 1 has the size {size!r}; give its height and width in pixels"
    for counts in ([0, 360], "0d91"):
        with pytest.raises(EvaluationError, match=re.escape(message)):
            instances_of(side, masks=[RUNS, {"size": size, "counts": counts}])


@pytest.mark.parametrize("side", ["truth", "prediction"])
def test_masks_without_pixels_are_refused(side):
    with pytest.raises(EvaluationError, match=r"image 0: mask 0 is bool with shape \[0, 0\]; it must be bool \[H, W\]"):
        instances_of(side, masks=np.zeros((2, 0, 0), bool))


def test_whole_numbers_of_any_type_are_labels_and_flags():
    expected = instances_of("truth", is_crowd=[False, True]).metrics()
    for flags in ([0, 1], [0.0, 1.0], np.array([0, 1], np.uint8)):
        assert instances_of("truth", labels=[0.0, 1.0], is_crowd=flags).metrics() == expected
    runs = [{"size": np.array([3, 120]), "counts": [0, 360]}, {"size": (3, np.int64(120)), "counts": [0, 360]}]
    assert instances_of("truth", masks=runs).metrics() == instances_of("truth", masks=[RUNS, RUNS]).metrics()
    empty = Instances([], np.array([], dtype=object))
    found = Instances(MASKS, [0, 1], [0.9, 0.8])
    assert evaluate_instances([empty], [found], class_names=["cat", "sky"]).metrics()["AP"] is None


def test_images_and_class_names_of_another_kind_are_refused():
    image = PanopticImage(TRUTH, {1: 0, 2: 1})
    with pytest.raises(EvaluationError, match="image 0: the truth is None; it must be a PanopticImage"):
        evaluate_panoptic([None], [image], **CLASSES)
    with pytest.raises(EvaluationError, match=r"image 0: the prediction is \(\); it must be Instances"):
        evaluate_instances([Instances([], [])], [()], class_names=["cat"])
    with pytest.raises(EvaluationError, match=r"truth is Instances\(.*; give a list with one entry per image"):
        evaluate_instances(Instances([], []), [Instances([], [], [])], class_names=["cat"])
    for names in (2, iter("ab")):
        with pytest.raises(EvaluationError, match=r"the class names are .*; give a list with one name per class"):
            evaluate_instances([], [], class_names=names)
        with pytest.raises(EvaluationError, match=r"the class names are .*; give a list with one name per class"):
            evaluate_semantic([], [], class_names=names)


def test_doubts_about_annotated_arrays_are_warnings():
    with pytest.raises(
        EvaluationError, match="image 0: segment 1 of the truth has 180 pixels, but states an area of 1"
    ):
        panoptic(areas={1: 1})
    with pytest.raises(EvaluationError, match="image 0: the truth: areas states inf for segment 1"):
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
