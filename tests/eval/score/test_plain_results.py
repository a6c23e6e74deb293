"""The reader of typed records gives the same metrics as the JSON reader, which reads all unusual files."""

import json
import math

import numpy as np
import pytest
from pycocotools import mask as coco_masks

from m2f.data_pipeline.errors import DataError
from m2f.eval.metrics.rle import TextMasks, chosen_masks
from m2f.eval.score.instances import instance_scoring
from m2f.eval.score.plain_results import as_entry, read_plain_results

PLAIN = {"image_id": 1, "category_id": 3, "score": 0.5, "segmentation": {"size": [2, 2], "counts": "22"}}


def read(*entries):
    return read_plain_results(json.dumps(entries).encode())


def test_plain_results_are_read_regardless_of_extra_fields():
    found = read(PLAIN, {**PLAIN, "bbox": [0, 0, 1, 1], "score": 1, "image_id": "seven"})
    assert as_entry(found[0]) == {**PLAIN, "segmentation": {"size": (2, 2), "counts": "22"}}
    assert (found[1].image_id, found[1].score) == ("seven", 1.0)
    assert read() == []


@pytest.mark.parametrize(
    "change",
    [
        {"image_id": True},
        {"image_id": 1.5},
        {"image_id": None},
        {"category_id": "3"},
        {"score": "0.5"},
        {"score": math.nan},
        {"score": math.inf},
        {"bbox": math.nan},
        {"segmentation": [[0, 0, 1, 0, 1, 1]]},
        {"segmentation": {"size": [2, 2], "counts": [2, 2]}},
        {"segmentation": {"size": [2], "counts": "22"}},
        {"segmentation": {"size": [2, 2.5], "counts": "22"}},
        {"segmentation": None},
    ],
)
def test_unusual_entry_falls_back_to_the_json_reader(change):
    assert read(PLAIN, {**PLAIN, **change}) is None


@pytest.mark.parametrize("data", [b"", b"{}", b"[", b"[1]", b"\xff", b"[{" * 5000, b"[" * 200_000])
def test_data_other_than_a_list_of_results_is_not_read(data):
    assert read_plain_results(data) is None


def test_last_value_of_a_repeated_key_counts_as_in_json():
    text = json.dumps([PLAIN]).replace('"score": 0.5', '"score": 0.5, "score": 0.25')
    assert read_plain_results(text.encode())[0].score == json.loads(text)[0]["score"] == 0.25


def test_text_masks_create_rle_on_access():
    masks = TextMasks((2, 2), ["22", "13"])
    assert list(masks) == [{"size": (2, 2), "counts": text} for text in ("22", "13")]
    assert chosen_masks(masks, [1]) == list(masks[1:]) == chosen_masks(tuple(masks), [1])


def test_both_readers_give_the_same_metrics(tmp_path):
    """A single float image id, which is valid, makes the JSON reader read the whole file."""
    rng = np.random.default_rng(0)
    annotations, results = [], []
    sizes = [(40, 30), (25, 60), (40, 30)]
    for image_id, size in enumerate(sizes):
        for number in range(6):
            mask = np.zeros(size, np.uint8)
            top, left = rng.integers(0, 20, 2)
            mask[top : top + rng.integers(3, 20), left : left + rng.integers(3, 20)] = 1
            moved = np.roll(mask, rng.integers(-2, 3), axis=1)
            rles = [coco_masks.encode(np.asfortranarray(binary_mask)) for binary_mask in (mask, moved)]
            texts = [{"size": list(size), "counts": rle["counts"].decode()} for rle in rles]
            entry = {"image_id": image_id, "category_id": int(rng.integers(2))}
            area = int(mask.sum())
            annotations.append(
                entry | {"id": number + 1, "area": area, "segmentation": texts[0], "iscrowd": number == 5}
            )
            scores = rng.random(2).round(1).tolist()
            results += [entry | {"score": score, "segmentation": texts[1]} for score in scores]
    images = [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(sizes)]
    categories = [{"id": k, "name": f"class {k}"} for k in range(2)]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    numbers = []
    for name, image_id in (("plain", 0), ("odd", 0.0)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([results[0] | {"image_id": image_id}, *results[1:]]))
        assert (read_plain_results(path.read_bytes()) is None) == (name == "odd")
        scoring = instance_scoring(truth, path, boundary=False, class_agnostic=False)
        numbers.append(scoring.run(1, lambda _: None).content)
    assert numbers[0] == numbers[1]
    assert numbers[0]["AP"] > 0
    broken = results[3] | {"segmentation": results[3]["segmentation"] | {"counts": "22"}}
    path.write_text(json.dumps([*results[:3], broken]))
    with pytest.raises(DataError, match="result 3: the run lengths of its RLE do not add up"):
        instance_scoring(truth, path, boundary=False, class_agnostic=False).run(1, lambda _: None)
