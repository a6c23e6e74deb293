"""Checks of timm model names, mostly without importing timm."""

import subprocess
import sys

import timm

from m2f.model.backbones.timm_names import _registered_names, name_problem


def test_every_timm_name_is_recognised():
    assert [name for name in timm.list_models() if name_problem(name) is not None] == []
    assert _registered_names() <= set(timm.list_models())
    assert name_problem("resnet50.a1_in1k") is None
    assert name_problem("convnext_base_in22k") is None  # a deprecated name that timm still accepts


def test_unknown_names_are_refused_with_similar_names():
    assert name_problem("resnet500").startswith("which timm does not have; did you mean resnet50, ")
    assert name_problem("???") == "which timm does not have; `timm.list_models()` lists all names"


def test_every_tag_of_timm_is_accepted_and_others_are_refused_with_its_list():
    known = timm.list_models("resnet*", include_tags=True)
    assert [name for name in [*known[::10], "vit_base_patch16_clip_quickgelu_224.openai"] if name_problem(name)] == []
    problem = str(name_problem("resnet50.nosuchtag"))
    assert problem.startswith("whose tag timm does not have; known: resnet50, resnet50.a1_in1k, ")
    assert "resnet50d" not in problem


def test_checking_a_common_name_imports_neither_timm_nor_torch():
    command = [sys.executable, "-m", "tests.model.backbones.timm_names_main"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "None None\n[]\n"
