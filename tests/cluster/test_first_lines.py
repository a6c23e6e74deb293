"""Tests that verbs print a message before they import large packages, which takes seconds."""

import subprocess
import sys
from pathlib import Path

from tests.waiting import PATIENCE_S

HEAVY = "torch,ray,mlflow,deepspeed"
FIRST_LINES = {
    "demo --output out": "demo below out: loading PyTorch, Ray and MLflow",
    "shard demo": "sharding train, val: opening the source",
    "plan demo": "demo: loading PyTorch",
    "train demo": "demo: loading PyTorch and MLflow",
    "train demo --launcher local": "demo: loading PyTorch and MLflow",
    "eval demo": "demo: loading PyTorch and MLflow",
    "predict demo image.jpg --output out": "demo: loading PyTorch",
    "export demo --format official --output out": "demo: loading PyTorch",
    "checkpoint ls demo": "demo: loading PyTorch",
    "analyze layers demo": "analyze layers: loading PyTorch",
    "compare runs/a runs/b": "comparing runs: loading MLflow",
    "submit demo": "connecting to the cluster",
}


def test_verbs_print_a_message_before_loading_large_packages(tmp_path):
    command = [sys.executable, Path(__file__).with_name("first_lines_main.py"), HEAVY, *FIRST_LINES]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert {line[2:]: lines[number + 1] for number, line in enumerate(lines) if line.startswith("> ")} == FIRST_LINES
