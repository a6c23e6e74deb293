"""Run lengths as text, read for many masks at once: as a slow reading of each, and as pycocotools writes them."""

import numpy as np
import pytest
from pycocotools import mask as coco_masks

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers.masks import read_rle, read_rles
from m2f.data_pipeline.readers.run_lengths import DamagedRunsError, check_texts, run_lengths


def slow(text):
    """Character by character, as the format is defined."""
    runs, place = [], 0
    while place < len(text):
        value, shift, more = 0, 0, True
        while more:
            code = ord(text[place]) - 48
            value |= (code & 31) << shift
            more, place, shift = bool(code & 32), place + 1, shift + 5
        if code & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


def texts_of(rng, count, height, width):
    masks = rng.random((count, height, width)) < rng.choice([0.0, 0.001, 0.3, 1.0], (count, 1, 1))
    return [rle["counts"].decode() for rle in coco_masks.encode(np.asfortranarray(masks.transpose(1, 2, 0)))]


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (40, 60), (300, 700)])
def test_many_texts_at_once_are_read_as_each_alone(size):
    texts = texts_of(np.random.default_rng(0), 12, *size)
    runs, starts = run_lengths(texts)
    assert [part.tolist() for part in np.split(runs, starts[1:])] == [slow(text) for text in texts]
    assert check_texts(texts, *size)
    assert not check_texts(texts, size[0] + 1, size[1])


def test_one_wrong_text_among_many_is_found_and_named():
    rng = np.random.default_rng(1)
    for seed in range(300):
        texts = texts_of(rng, 4, 9, 11)
        wrong = int(rng.integers(4))
        place = int(rng.integers(len(texts[wrong])))
        texts[wrong] = texts[wrong][:place] + chr(int(rng.integers(40, 120))) + texts[wrong][place + 1 :]
        try:
            runs = slow(texts[wrong]) if all(48 <= ord(c) < 112 for c in texts[wrong]) else [-1]
        except IndexError:
            runs = [-1]
        sound = min(runs) >= 0 and sum(runs) == 99
        assert check_texts(texts, 9, 11) == sound, seed
        rles = [{"size": [9, 11], "counts": text} for text in texts]
        if not sound:
            with pytest.raises(DataError, match=f"^mask {wrong}: "):
                read_rles(rles, 9, 11, lambda i: f"mask {i}")


@pytest.mark.parametrize("text", ["", "o", "oooooooo0", "é", None, 5, b"0", "~"])
def test_what_is_no_run_lengths_is_damaged(text):
    with pytest.raises(DamagedRunsError):
        run_lengths(["4", text])
    with pytest.raises(DataError, match="its RLE is damaged"):
        read_rle({"size": [2, 2], "counts": text}, 2, 2, "x")


def test_negative_runs_that_add_up_are_no_mask():
    """pycocotools would read 2^32 less one pixel."""
    text = "5O0"  # 5, -1, 0
    assert slow(text) == [5, -1, 0]
    assert not check_texts([text], 2, 2)


def test_no_mask_and_masks_of_all_kinds():
    assert read_rles([], 4, 4, str) == ()
    kinds = [{"size": [4, 4], "counts": [16]}, {"size": [4, 4], "counts": "`0"}, [[0, 0, 2, 0, 2, 2, 0, 2]]]
    assert read_rles(kinds, 4, 4, str) == tuple(read_rle(kind, 4, 4, "x") for kind in kinds)
