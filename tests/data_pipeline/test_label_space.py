"""Matching the classes of two tables."""

from __future__ import annotations

import pytest

from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.label_space import LabelSpace, describe_subset, match_classes, require_match

CAR, SKY, DOG = (
    Category(1, "car", True, (1, 2, 3)),
    Category(2, "sky", False, (4, 5, 6)),
    Category(3, "dog", True, (7,) * 3),
)
MODEL = (CAR, SKY, DOG)


def test_tables_that_differ_only_in_colours_are_equal():
    assert match_classes(MODEL, MODEL).kind == "equal"
    recolored = (Category(1, "car", True, (9, 9, 9)), SKY, DOG)
    assert match_classes(MODEL, recolored).kind == "equal"
    assert match_classes(MODEL, recolored).labels == (0, 1, 2)


def test_tables_with_another_order_or_other_ids_are_matched_by_name():
    match = match_classes(MODEL, (DOG, CAR, SKY))
    assert (match.kind, match.labels) == ("by_name", (1, 2, 0))
    renumbered = (
        Category(70, "car", True, (0,) * 3),
        Category(1, "sky", False, (0,) * 3),
        Category(2, "dog", True, (0,) * 3),
    )
    match = match_classes(MODEL, renumbered)
    assert (match.kind, match.labels) == ("by_name", (0, 1, 2))


def test_subset_keeps_the_common_classes_and_is_described():
    match = match_classes(MODEL, (DOG, Category(9, "cat", True, (0,) * 3)))
    assert (match.kind, match.labels) == ("subset", (None, None, 0))
    assert (match.only_first, match.only_second) == (("car", "sky"), ("cat",))
    assert describe_subset(match, "the model", "val") == "1 class in both; val lacks car, sky; the model lacks cat"
    assert describe_subset(match_classes(MODEL, MODEL), "the model", "val") is None


@pytest.mark.parametrize(
    ("second", "rows"),
    [
        ((CAR, Category(2, "sky", True, (0,) * 3), DOG), "id 2 'sky' (stuff); val: id 2 'sky' (thing)"),
        ((CAR, SKY, Category(3, "puppy", True, (0,) * 3)), "id 3 'dog' (thing); val: id 3 'puppy' (thing)"),
        ((CAR, SKY, DOG, Category(4, "dog", True, (0,) * 3)), "val: id 4 'dog' (thing)"),
        ((Category(9, "cat", True, (0,) * 3),), "id 1 'car' (thing); val: -"),
    ],
    ids=["thing against stuff", "one id for two names", "one name twice", "nothing in common"],
)
def test_conflicts_are_refused_with_the_rows_of_both_tables(second, rows):
    with pytest.raises(DataError, match="contradict") as caught:
        require_match(MODEL, second, "the model", "val")
    assert rows in str(caught.value)


def test_a_new_data_set_may_use_old_ids_for_new_classes():
    assert match_classes(MODEL, (CAR, SKY, Category(3, "cat", True, (0,) * 3)), ids=False).kind == "subset"


def test_label_space_round_trips_through_json():
    space = LabelSpace("panoptic", MODEL)
    assert LabelSpace.from_json(space.to_json(), "x") == space
    with pytest.raises(DataError, match="weights: the label space"):
        LabelSpace.from_json({"task": "panoptic", "classes": [{"id": 1}]}, "weights")
