"""Compile the model's parts, each into its own graph."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch

from m2f.model.segmenter import Segmenter
from m2f.trainer.errors import TrainingError

_CPP = "clang++" if sys.platform == "darwin" else "g++"


def compile_regions(model: Segmenter, backend: str | Callable[..., Any] = "inductor") -> None:
    """Mark the compilable parts of a model. Each is compiled when an input of a new shape first reaches it.

    Images of one size need one graph per region, regardless of their targets, which only the uncompiled criterion
    receives. With pilots, the decoder has one graph per padded number of pilots (`m2f.model.pilots.padded_number`),
    compiled when that number first occurs. Names of weights and DeepSpeed's hooks are preserved.

    A region that Inductor cannot compile runs uncompiled, with a warning, so that a compiler bug does not end a run.
    Raises TrainingError if there is no compiler.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "inductor" and find_compiler(device) is None:
        raise TrainingError(
            f"training.compile needs {describe_compilers(device)} on every machine; install it (apt-get install g++), "
            "or set training.compile to false"
        )
    if backend == "inductor":
        torch._dynamo.config.suppress_errors = True
    for name in model.regions:
        model.get_submodule(name).compile(backend=backend, dynamic=False)


def compile_cache(environment: Mapping[str, str]) -> Path:
    """Return the folder in which `keep_compiled_code` makes torch.compile keep its results.

    Raises RuntimeError if this user has no home folder.
    """
    name = environment.get("TORCHINDUCTOR_CACHE_DIR", "")
    # PyTorch writes its default into the environment when Inductor is imported.
    is_default = name.startswith(str(Path(tempfile.gettempdir(), "torchinductor_")))
    return Path(name) if name and not is_default else Path.home() / ".cache/m2f/compiled"


def keep_compiled_code(environment: MutableMapping[str, str]) -> None:
    """Make torch.compile keep compiled code in the user's cache folder, so that a restart compiles nothing.

    PyTorch's default is a folder for temporary files, which a restart of the machine empties. A setting by the user is
    kept. If the folder is not writable, PyTorch's default remains. Inductor keeps its Triton kernels in the same
    folder, unless the user sets TRITON_CACHE_DIR. Call this before compiling.
    """
    try:
        folder = compile_cache(environment)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    if os.access(folder, os.W_OK):
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def find_compiler(device: str) -> str | None:
    """Return the path of the compiler for kernels: C++ for a CPU, C for a GPU's launchers; None if it is missing."""
    found = (shutil.which(name) for name in _compilers(device))
    return next((path for path in found if path is not None), None)


def describe_compilers(device: str) -> str:
    """Describe the compilers that `find_compiler` looks for, for use in a message."""
    language, variable = ("C++", "CXX") if device == "cpu" else ("C", "CC")
    return f"a {language} compiler ({' or '.join(_compilers(device))}; set {variable} to use another)"


def _compilers(device: str) -> tuple[str, ...]:
    """Return the commands that PyTorch (CPU) and Triton (GPU) look for. Arguments in CXX or CC are removed."""
    named = os.environ.get("CXX" if device == "cpu" else "CC", "").split()
    if named:
        return (named[0],)
    return (_CPP,) if device == "cpu" else ("gcc", "clang")
