"""Counts with a noun in messages."""

import pytest

from m2f.model.format_count import format_count


@pytest.mark.parametrize(("number", "text"), [(0, "0 shards"), (1, "1 shard"), (1200, "1,200 shards")])
def test_format_count_uses_singular_and_plural(number, text):
    assert format_count(number, "shard") == text


def test_format_count_accepts_an_irregular_plural():
    assert (format_count(1, "batch", "batches"), format_count(2, "batch", "batches")) == ("1 batch", "2 batches")
