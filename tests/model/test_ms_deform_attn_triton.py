"""The fused kernel, run by Triton's interpreter where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="module")
def seen():
    script = Path(__file__).with_name("fused_kernel_oracle.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(script.parents[2])}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["float32", "reference_per_image", "odd_dim", "many_blocks", "in_order"])
def test_the_kernel_equals_the_plain_form_and_its_gradients(seen, case):
    assert max(seen[case].values()) < 2e-6, seen[case]


@pytest.mark.parametrize(("case", "tolerance"), [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_half_precision_rounds_values_only(seen, case, tolerance):
    assert seen[case]["output"] < tolerance
    assert seen[case]["value"] < tolerance
    assert max(seen[case]["offsets"], seen[case]["logits"]) < 2e-5  # never half: geometry and softmax


def test_a_location_without_a_number_is_not_hidden(seen):
    assert seen["nan"]
