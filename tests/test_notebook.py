"""Tests that the notebook of the documentation runs from top to bottom and shows pictures."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.waiting import PATIENCE_S

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "python.ipynb"
RUNNER = Path(__file__).with_name("notebook_main.py")


def read_outputs(notebook):
    """Return the texts and pictures in the outputs of a notebook, in order."""
    texts, pictures = [], []
    for cell in json.loads(notebook.read_text())["cells"]:
        for output in cell.get("outputs", ()):
            texts.append("".join(output.get("text") or output["data"]["text/plain"]))
            if "image/jpeg" in output.get("data", {}):
                jpeg = np.frombuffer(base64.b64decode(output["data"]["image/jpeg"]), np.uint8)
                pictures.append(cv2.imdecode(jpeg, cv2.IMREAD_COLOR))
    return "\n".join(texts), pictures


def test_stored_notebook_shows_pictures_and_no_local_paths():
    text, pictures = read_outputs(NOTEBOOK)
    assert [picture.shape[1] > 900 for picture in pictures] == [True] * 4
    assert all(len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000 for picture in pictures)
    assert not re.search(r"/(tmp|home|root|work|Users)/", text)
    assert NOTEBOOK.stat().st_size < 2_500_000


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    executed = tmp_path / "executed.ipynb"
    words = [sys.executable, str(RUNNER), str(NOTEBOOK), str(executed)]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 0, result.stderr
    text, pictures = read_outputs(executed)
    assert len(pictures) == 4
    recomputed, stored = map(float, re.search(r"PQ (\S+), the run's own (\S+)", text).groups())
    assert recomputed == stored > 40
