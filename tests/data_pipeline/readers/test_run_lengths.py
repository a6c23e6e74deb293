"""Batched reading of compressed run lengths, compared with a slow decoder and with pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as coco_masks

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers.masks import checked_areas, compressed_texts, read_rle
from m2f.data_pipeline.readers.run_lengths import DamagedRunsError, text_areas


def decode_slowly(text):
    """Decode character by character, as the format is defined."""
    runs, index = [], 0
    while index < len(text):
        value, shift, more = 0, 0, True
        while more:
            code = ord(text[index]) - 48
            value |= (code & 31) << shift
            more, index, shift = bool(code & 32), index + 1, shift + 5
        if code & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


def is_valid(texts, height, width):
    try:
        return bool((text_areas(texts, height, width) >= 0).all())
    except DamagedRunsError:
        return False


def random_texts(rng, count, height, width):
    masks = rng.random((count, height, width)) < rng.choice([0.0, 0.001, 0.3, 1.0], (count, 1, 1))
    return [rle["counts"].decode() for rle in coco_masks.encode(np.asfortranarray(masks.transpose(1, 2, 0)))]


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (40, 60), (300, 700)])
def test_areas_of_many_texts_equal_those_of_each_text(size):
    texts = random_texts(np.random.default_rng(0), 12, *size)
    runs = [decode_slowly(text) for text in texts]
    assert [sum(part) for part in runs] == [size[0] * size[1]] * len(texts)
    assert text_areas(texts, *size).tolist() == [sum(part[1::2]) for part in runs]
    assert text_areas(texts, size[0] + 1, size[1]).tolist() == [-1] * len(texts)


def test_areas_are_computed_over_several_batches():
    rng = np.random.default_rng(2)
    texts = [text for _ in range(60) for text in random_texts(rng, 16, 5, 9)]
    assert text_areas(texts, 5, 9).tolist() == [sum(decode_slowly(text)[1::2]) for text in texts]
    assert text_areas([], 5, 9).tolist() == []


def test_one_invalid_text_among_many_is_found():
    rng = np.random.default_rng(1)
    for seed in range(300):
        texts = random_texts(rng, 4, 9, 11)
        row = int(rng.integers(4))
        index = int(rng.integers(len(texts[row])))
        texts[row] = texts[row][:index] + chr(int(rng.integers(40, 120))) + texts[row][index + 1 :]
        try:
            runs = decode_slowly(texts[row]) if all(48 <= ord(c) < 112 for c in texts[row]) else [-1]
        except IndexError:
            runs = [-1]
        expected = min(runs) >= 0 and sum(runs) == 99
        assert is_valid(texts, 9, 11) == expected, seed
        if not expected:
            with pytest.raises(DataError, match=f"^mask {row}: "):
                read_rle({"size": [9, 11], "counts": texts[row]}, 9, 11, f"mask {row}")


@pytest.mark.parametrize("text", ["", "o", "oooooooo0", "é", None, 5, b"0", "~"])
def test_invalid_run_lengths_are_refused(text):
    with pytest.raises(DamagedRunsError):
        text_areas(["4", text], 2, 2)
    with pytest.raises(DataError, match="its RLE is damaged"):
        read_rle({"size": [2, 2], "counts": text}, 2, 2, "x")


def test_negative_runs_with_the_right_sum_are_invalid():
    """pycocotools would read the run of -1 as 2^32 - 1 pixels."""
    text = "5O0"  # runs 5, -1, 0
    assert decode_slowly(text) == [5, -1, 0]
    assert text_areas([text], 2, 2).tolist() == [-1]


def test_only_compressed_masks_of_one_size_are_batched():
    mask = {"size": [4, 4], "counts": "`0"}
    assert compressed_texts([], 4, 4) == []
    assert compressed_texts([mask, mask], 4, 4) == ["`0", "`0"]
    for other in (mask | {"size": [4, 5]}, mask | {"counts": [16]}, [[0, 0, 2, 0, 2, 2, 0, 2]], None):
        assert compressed_texts([mask, other], 4, 4) is None
    assert checked_areas(["`0"], 4, 4).tolist() == [0]
    assert checked_areas(["`0"], 4, 5) is None
    assert checked_areas(["o"], 4, 4) is None
