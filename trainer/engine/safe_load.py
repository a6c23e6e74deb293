"""Read torch's files without executing what they hold, whoever reads them.

A pickle is a program. DeepSpeed reads its own files with `weights_only=False`, so that whoever can write a run folder
could run code on every rank. Within `safe_loads`, torch makes tensors, plain values and a few small classes of such a
file, and refuses whatever else the file names before it looks that up.
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
"""What a file raises that torch did not write. Others, such as a full memory, are no fault of the file."""


@contextmanager
def safe_loads() -> Iterator[None]:
    """Make `torch.load` safe in this process, DeepSpeed's calls among others.

    A file that asks for more raises CheckpointError, which names the file and what it asks for. Threads share this.
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
        except _MALFORMED as error:
            raise CheckpointError(f"{name} {_reason(error)}") from error
        return content

    return safe_load


def _classes_of_deepspeed() -> list[Any]:
    """All that DeepSpeed 0.19 writes beside tensors and plain values. They have no code that data could steer."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _reason(error: Exception) -> str:
    """In our words: torch's own text advises to load the file unsafely."""
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and asked:
        return f"asks for {asked[1]}, which no checkpoint of this program does; nothing of it was executed"
    return f"is not what DeepSpeed writes ({type(error).__name__}: {str(error).partition('. ')[0]:.200})"


def _check_names(content: Any, file: str) -> None:
    """Refuse names that are paths: the conversion for other ranks makes folders of names."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            if isinstance(name, str) and ("/" in name or key_problem(name)):
                raise CheckpointError(f"{file} has the name {name!a:.100}, which could lead out of its folder")
            _check_names(value, file)
    elif isinstance(content, list | tuple):
        for value in content:
            _check_names(value, file)
