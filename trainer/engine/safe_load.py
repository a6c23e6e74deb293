"""Read torch files without executing code from them, whichever library reads them.

A pickle can run arbitrary code. DeepSpeed reads its own files with `weights_only=False`, so anyone with write access to
a run folder could run code on every rank. Inside `safe_loads`, torch builds only tensors, plain values and a few small
classes. It rejects every other name in a file before it looks the name up.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from m2f.data_pipeline.keys import key_problem
from m2f.trainer.errors import CheckpointError

_MALFORMED = (
    pickle.UnpicklingError,
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, RecursionError, TypeError, ValueError),
)
"""Errors raised for a file that torch did not write. Other errors, such as a lack of memory, have other causes."""


@contextmanager
def safe_loads() -> Iterator[None]:
    """Make `torch.load` safe in this process, including calls by DeepSpeed.

    A file that needs any other class or function raises CheckpointError, which names both. Applies to all threads.
    """
    load = torch.load
    torch.load = _safe(load)
    try:
        with torch.serialization.safe_globals(_classes_of_deepspeed()):
            yield
    finally:
        torch.load = load


def _safe(load: Callable[..., Any]) -> Callable[..., Any]:
    def safe_load(file: str | Path, map_location: Any = None, **options: Any) -> Any:
        name = Path(file).name
        try:
            content = load(file, map_location=map_location, **options | {"weights_only": True})
            _check_names(content, name)
        except CheckpointError:
            raise
        except _MALFORMED as error:
            raise CheckpointError(f"{name} {_reason(error)}") from error
        return content

    return safe_load


def _classes_of_deepspeed() -> list[Any]:
    """Return the classes that DeepSpeed 0.19 writes besides tensors and plain values. None lets a file run code."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _reason(error: Exception) -> str:
    """Describe the error in our own words, because torch's message advises loading the file unsafely."""
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and match:
        return f"references {match[1]}, which is not allowed in a checkpoint; nothing in it was executed"
    return f"is not a valid checkpoint file ({type(error).__name__}: {str(error).partition('. ')[0]:.200})"


def _check_names(content: Any, file: str) -> None:
    """Reject names that are paths, because the conversion for another number of ranks creates folders from names."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            if isinstance(name, str) and ("/" in name or key_problem(name)):
                raise CheckpointError(f"{file} contains the name {name!a:.100}, which could point outside its folder")
            _check_names(value, file)
    elif isinstance(content, list | tuple):
        for value in content:
            _check_names(value, file)
