import numpy as np
import pytest
import torch

from m2f.model.position_encoding import sine_position_embedding


@pytest.mark.parametrize(("key", "height", "width"), [("pe_16_5x7", 5, 7), ("pe_128_2x3", 2, 3)])
def test_sine_embedding_equals_the_official_one(goldens, key, height, width):
    expected = torch.from_numpy(np.load(goldens / "b_position_embedding.npz")[key][0])
    actual = sine_position_embedding(height, width, expected.shape[0]).permute(2, 0, 1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_stays_float32_under_autocast():
    plain = sine_position_embedding(50, 33, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = sine_position_embedding(50, 33, 64)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(plain, under_autocast)


def test_first_half_depends_on_rows_only_and_second_half_on_columns_only():
    embedding = sine_position_embedding(4, 6, 16)
    assert torch.equal(embedding[:, :1, :8].expand(4, 6, 8), embedding[..., :8])
    assert torch.equal(embedding[:1, :, 8:].expand(4, 6, 8), embedding[..., 8:])
