"""Tests that the documentation agrees with the code."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch

from m2f.cluster.cli import parse_verb
from m2f.cluster.recipe.explain import explain
from m2f.cluster.recipe.load import load_recipe
from m2f.model.config import ModelConfig
from m2f.model.export.official import write_official
from m2f.model.mask2former import build_model
from tests.model.loss_oracle import make_targets

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"))
DESIGN = REPOSITORY / "docs" / "design.md"
CODE = ("model", "data_pipeline", "trainer", "eval", "cluster")
FOLDERS = "|".join((*CODE, "configs", "tests", "benchmarks"))


def test_configuration_document_matches_the_settings():
    document = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert document.strip() == explain().strip(), "run `make docs`"


def test_links_between_documents_resolve():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"


def test_files_named_in_documents_exist():
    for document in DOCUMENTS:
        for path in re.findall(rf"(?:{FOLDERS})/[\w/]+\.(?:py|yaml)\b", document.read_text()):
            assert (REPOSITORY / path).is_file(), f"{document.name}: {path}"


def test_every_numeric_constant_has_a_docstring_or_a_comment():
    for path in (path for folder in ("benchmarks", *CODE) for path in (REPOSITORY / folder).rglob("*.py")):
        lines = ["", *path.read_text().splitlines(), ""]
        for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
            if re.match(r"[A-Z_][A-Z0-9_]*(, [A-Z_][A-Z0-9_]*)* = -?\d", line):
                has_comment = "#" in line or before.startswith("#")
                assert has_comment or after.startswith('"""'), f"{path}: {line}: state its meaning, unit and reason"


def test_documented_layers_match_the_import_contracts():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    lines = [re.sub(r"^[a-z_]+/", "", line.strip()).strip() for line in DESIGN.read_text().splitlines()]
    text = "\n".join(lines)
    for contract in project["tool"]["importlinter"]["contracts"]:
        if "containers" in contract:
            assert "\n".join(layer.replace(" | ", ", ") for layer in contract["layers"]) in text, contract["name"]


def _commands(document):
    """Return the commands of m2f in the indented blocks of a document, without comments and with all optional parts."""
    text = document.read_text().replace("\\\n", " ")
    lines = re.findall(r"^    (?:\w+=\S+ )*m2f (.+)$", text, re.MULTILINE)
    return [shlex.split(re.sub(r"[][]", "", line), comments=True) for line in lines if "|" not in line]


@pytest.mark.parametrize("name", sorted(path.relative_to(REPOSITORY).as_posix() for path in DOCUMENTS))
def test_commands_in_documents_are_accepted(name):
    for words in _commands(REPOSITORY / name):
        parse_verb(words)


def test_the_quick_start_has_a_recipe_and_a_command_for_every_stage(tmp_path):
    document = REPOSITORY / "docs" / "quick_start.md"
    verbs = [words[0] for words in _commands(document)]
    assert [verb for verb in dict.fromkeys(verbs) if verb not in ("doctor", "config", "compare")] == [
        "shard",
        "stats",
        "preview",
        "train",
        "predict",
    ]
    (recipe,) = re.findall(r"```yaml\n(.*?)```", document.read_text(), re.DOTALL)
    (tmp_path / "first.yaml").write_text(recipe)
    overrides = [word for words in _commands(document) for word in words if "=" in word]
    assert load_recipe(tmp_path / "first.yaml", overrides).name == "second"


@pytest.mark.slow
def test_python_examples_in_the_models_document_run(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    config = ModelConfig(num_classes=133)
    write_official(build_model(config, pretrained_backbone=False), config, tmp_path / "model_final.pth")
    names = {"targets": make_targets((3, 0), size=(192, 256))}
    examples = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "models.md").read_text(), re.DOTALL)
    exec(compile("\n".join(examples), "docs/models.md", "exec"), names)
    assert names["losses"].total.isfinite()
