"""Compiling the model's parts, each into one graph of its own."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch

from m2f.model.segmenter import Segmenter
from m2f.trainer.errors import TrainingError

_CPP = "clang++" if sys.platform == "darwin" else "g++"


def compile_regions(model: Segmenter, backend: str | Callable[..., Any] = "inductor") -> None:
    """Let the parts of a model that are graphs of their own compile themselves at their first input of each shape.

    Images of one size make one graph per region, whatever they show: targets are seen by the criterion alone, which is
    not compiled. With pilots the decoder has one graph for each number of them (`m2f.model.pilots.padded_number`), made
    when it first comes. Weights keep their names, and DeepSpeed its hooks.

    Raises TrainingError where there is no compiler.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "inductor" and find_compiler(device) is None:
        raise TrainingError(
            f"training.compile needs {compiler_names(device)} on every machine; install it (apt-get install g++), or "
            "set training.compile to false"
        )
    for name in model.regions:
        model.get_submodule(name).compile(backend=backend, dynamic=False)


def find_compiler(device: str) -> str | None:
    """Path of what builds kernels: C++ for those of a CPU, C for the launchers of a GPU's; None where it is missing."""
    found = (shutil.which(name) for name in _compilers(device))
    return next((path for path in found if path is not None), None)


def compiler_names(device: str) -> str:
    """What `find_compiler` looks for, in words."""
    language, variable = ("C++", "CXX") if device == "cpu" else ("C", "CC")
    return f"a {language} compiler ({' or '.join(_compilers(device))}; {variable} names another)"


def _compilers(device: str) -> tuple[str, ...]:
    """As PyTorch (CPU) and Triton (GPU) choose them; a variable may hold arguments too."""
    named = os.environ.get("CXX" if device == "cpu" else "CC", "").split()
    if named:
        return (named[0],)
    return (_CPP,) if device == "cpu" else ("gcc", "clang")
