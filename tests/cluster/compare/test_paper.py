"""The published results that `m2f compare` shows."""

import re
from pathlib import Path

import m2f
from m2f.cluster.compare.paper import PAPER_RESULTS, paper_result

CONFIGS = Path(m2f.__file__).parents[1] / "configs"


def test_published_results_match_the_recipes():
    """Line 2 of a recipe states its published results."""
    num_compared = 0
    for path in CONFIGS.rglob("*.yaml"):
        row, expectation = paper_result(path.stem), path.read_text().splitlines()[1]
        if row is not None:
            for metric, number in re.findall(r"\b(PQ|AP|mIoU) (\d+\.\d+)", expectation.replace("boundary AP", "")):
                assert row.metrics[metric] == float(number), path
                num_compared += 1
    assert num_compared
    assert len(PAPER_RESULTS) > 40
