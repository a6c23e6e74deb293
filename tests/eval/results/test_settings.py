"""The digest of evaluation settings identifies results, and does not change when settings are added."""

import dataclasses

from m2f.eval.config import MultiScale, SlidingWindows, WholeImage, stored_test_time
from m2f.eval.results.settings import EvaluationSettings

SETTINGS = EvaluationSettings(
    tasks=("panoptic",),
    extra_metrics=(),
    shortest_edge=800,
    max_size=1333,
    batch_size=1,
    limit=None,
    test_time={"kind": "whole"},
    postprocess={"object_threshold": 0.8},
    weights="ab",
)


def test_settings_of_earlier_results_keep_their_digest():
    assert SETTINGS.digest == "9e07053b"  # the digest before `shrink` and `precision` were added
    first = {"kind": "multi_scale", "shortest_edges": (256, 384), "max_size": 3584, "flip": True}
    assert stored_test_time(MultiScale(shortest_edges=(256, 384))) == first  # before `window` and `stride` were added
    windows = MultiScale(shortest_edges=(256, 384), window=64, stride=40)
    assert stored_test_time(windows) == first | {"window": 64, "stride": 40}
    assert stored_test_time(WholeImage()) == {"kind": "whole"}  # before `square` was added
    assert stored_test_time(WholeImage(square=True)) == {"kind": "whole", "square": True}
    first = {"kind": "windows", "size": 64, "stride": 40, "shortest_edge": None}
    assert stored_test_time(SlidingWindows(size=64, stride=40)) == first  # before `placement` was added
    assert stored_test_time(SlidingWindows(size=64, stride=40, placement="even")) == first | {"placement": "even"}


def test_results_state_the_placement_of_windows_and_squares():
    assert SlidingWindows(size=64, stride=40).describe() == "windows of 64 every 40 pixels"
    even = SlidingWindows(size=64, stride=40, placement="even")
    assert even.describe() == "windows of 64 at most every 40 pixels, spread evenly"
    assert WholeImage().describe() is None
    assert WholeImage(square=True).describe() == "padded to squares"


def test_different_settings_have_different_digests():
    changes = (
        {"shrink": "bilinear"},
        {"precision": "bf16"},
        {"max_size": 1000},
        {"limit": 5},
        {"weights": None},
        {"batch_size": 2},
    )
    assert len({dataclasses.replace(SETTINGS, **change).digest for change in ({}, *changes)}) == 1 + len(changes)
