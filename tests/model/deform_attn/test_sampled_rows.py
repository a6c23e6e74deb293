"""The table of values with margins, and the table rows that samples read."""

import math

import pytest
import torch

from m2f.model.deform_attn.cpu import MARGIN, Samples, padded_table, unpadded_values

SHAPES = [(3, 5), (1, 2)]
BATCH, HEADS, DIM = 2, 3, 4


def values():
    count = BATCH * sum(height * width for height, width in SHAPES) * HEADS * DIM
    return torch.arange(1.0, count + 1).view(BATCH, -1, HEADS, DIM)


def test_padding_keeps_values_and_fills_margins_with_zeros():
    value = values()
    table = padded_table(value, SHAPES)
    assert torch.equal(unpadded_values(table, value, SHAPES), value)
    assert table.shape == (BATCH * HEADS * sum((h + 2 * MARGIN) * (w + 2 * MARGIN) for h, w in SHAPES), DIM)
    assert (table != 0).sum() == value.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_at_a_pixel_centre_reads_only_the_row_of_that_pixel(dtype):
    table, value = padded_table(values().to(dtype), SHAPES), values().to(dtype)
    pixel = 0
    for level, (height, width) in enumerate(SHAPES):
        for line in range(height):
            for column in range(width):
                locations = torch.full((BATCH, 1, HEADS, len(SHAPES), 1, 2), 0.5, dtype=dtype)
                locations[..., level, 0, 0] = (column + 0.5) / width
                locations[..., level, 0, 1] = (line + 0.5) / height
                found = table[Samples.locate(SHAPES, locations).rows[..., 0, level].long()]
                assert torch.equal(found[:, 0], value[:, pixel])
                pixel += 1


@pytest.mark.parametrize("far", [-1e30, -7.0, 7.0, 1e30, math.inf, -math.inf, math.nan])
def test_rows_of_locations_outside_the_maps_stay_within_the_table(far):
    locations = torch.full((BATCH, 1, HEADS, len(SHAPES), 1, 2), far)
    samples, table = Samples.locate(SHAPES, locations), padded_table(values(), SHAPES)
    assert samples.rows.min() >= 0
    assert samples.rows.max() < len(table)
    if math.isfinite(far):
        assert not table[samples.rows.long()].any()
    else:
        assert samples.x.isnan().all()
        assert samples.row_weights(torch.ones(BATCH, 1, HEADS, len(SHAPES), 1)).isnan().all()
