import numpy as np

from m2f.data_pipeline.randomness import Stream, random_words, sample_rng


def test_words_equal_the_published_test_vectors():
    """Random123's test vector of Philox4x64-10 for counter and key 0. NumPy increments the counter before use."""
    rng = np.random.Philox(key=np.zeros(2, np.uint64), counter=np.full(4, 2**64 - 1, np.uint64))
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert [int(word) for word in rng.random_raw(4)] == expected


def test_words_depend_on_every_argument_and_nothing_else():
    base = random_words(1, Stream.CHUNK_ORDER, 2, 3, 8).tolist()
    assert base == random_words(1, Stream.CHUNK_ORDER, 2, 3, 8).tolist()
    assert base[:4] == random_words(1, Stream.CHUNK_ORDER, 2, 3, 4).tolist()
    others = [(0, Stream.CHUNK_ORDER, 2, 3), (1, Stream.AUGMENT, 2, 3), (1, Stream.CHUNK_ORDER, 3, 2)]
    assert all(base != random_words(*other, 8).tolist() for other in others)


def test_neighbouring_positions_are_independent():
    draws = np.array([sample_rng(7, position, Stream.AUGMENT).random(4) for position in range(4000)])
    assert np.abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.05
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.06
    assert abs(draws.mean() - 0.5) < 0.01


def test_any_integer_is_a_valid_seed():
    assert len({sample_rng(seed, 0, Stream.AUGMENT).random() for seed in (-1, 0, 2**63, 2**64 - 2)}) == 4
