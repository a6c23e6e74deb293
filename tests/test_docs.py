"""The written documentation agrees with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.explain import explain
from cluster.recipe import parse_recipe

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


def test_the_settings_are_described_as_they_are():
    written = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert written.strip() == explain().strip(), "run `make docs`"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_begin_with_command_and_result(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert "m2f " in lines[0]
    assert re.search(r"PQ|AP|mIoU", lines[1]), "line 2 says which result to expect"
    config = parse_recipe(path.read_text(), source=path.name)
    assert config.name == path.stem


def test_links_between_documents_lead_somewhere():
    for document in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"
