"""The commands of docs/quick_start.md and docs/own_data.md run in order, with fewer images and steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tool_exports import mask_pngs, yolo_seg
from tests.waiting import PATIENCE_S

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]

DOCS = Path(__file__).resolve().parents[1] / "docs"
FEWER = {
    "num_images: 600": "num_images: 12",
    "num_images: 20": "num_images: 3",
    "max_steps: 800": "max_steps: 4",
    "every_steps: 400": "every_steps: 2",
    "log_every_steps: 20": "log_every_steps: 1",
}
"""Replacements in the recipe of the quick start."""
TWO_STEPS = " training.max_steps=2 training.global_batch=2 training.micro_batch=1 training.schedule.warmup_steps=0"
"""Added to `m2f train` for recipes that `m2f init` writes."""


def _section(page: str, heading: str) -> str:
    """Return the text from a heading to the next one."""
    (text,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", page, re.DOTALL | re.MULTILINE)
    return text


def _commands(page: str) -> list[str]:
    """Return the indented lines outside fenced blocks, without `mlflow ui`, which does not exit."""
    page = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    return [line for line in re.findall(r"^    (\w.*)$", page, re.MULTILINE) if not line.startswith("mlflow ui")]


def _run(command: str, folder: Path) -> str:
    """Run a command line in a shell and return its output."""
    # A user's shell has no Ray settings, so each command starts its own cluster.
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_commands_of_the_quick_start_run(tmp_path):
    page = (DOCS / "quick_start.md").read_text()
    (recipe,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    for written, fewer in FEWER.items():
        assert written in recipe
        recipe = recipe.replace(written, fewer)
    (tmp_path / "first.yaml").write_text(recipe)
    (_, *commands) = _commands(page)  # `m2f doctor` fails if this machine lacks something
    for command in commands:
        _run(command, tmp_path)
    assert (tmp_path / "preview.png").is_file()
    assert len(list((tmp_path / "predictions" / "overlays").iterdir())) == 3
    for run in ("first", "second"):
        assert list((tmp_path / "runs" / run).glob("evaluations/**/report.html")), run


@pytest.mark.parametrize(
    ("heading", "make_export", "folder", "images"),
    [("Example: semantic", mask_pngs, "road", 6), ("Example: instances", yolo_seg, "cells", 2)],
)
def test_commands_of_the_page_on_own_data_run(heading, make_export, folder, images, tmp_path):
    make_export(tmp_path / folder)
    commands = _commands(_section((DOCS / "own_data.md").read_text(), heading))
    assert [command.split()[1] for command in commands] == ["init", "shard", "train", "predict"]
    for command in commands:
        _run(command + TWO_STEPS if command.startswith("m2f train") else command, tmp_path)
    assert len(list((tmp_path / "predictions" / "overlays").iterdir())) == images
