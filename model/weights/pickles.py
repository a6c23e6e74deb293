"""Reader of plain pickles of arrays and tensors, as Detectron2 publishes them, that never executes their code.

A pickle is a program that calls the functions it names and modifies the objects it has. Here every allowed name is
mapped to a stand-in of this module. A pickle can therefore not reach any function, class or data type of the process.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

_NUMERIC = re.compile(r"[fiu][248]|[iu]1|b1")
"""Data types of arrays that are read, in NumPy's notation: floats, integers and bool."""


def read_pickle(file: BinaryIO) -> Any:
    """Return the contents of a pickle: plain values, OrderedDicts, tensors and `PickledArray`s.

    Raises pickle.UnpicklingError with the name if the pickle uses any other type or function.
    """
    return _ArrayUnpickler(file, encoding="latin1").load()  # the encoding of Python 2 pickles


class PickledArray:
    """Array of a pickle. It has values after the pickle has set its state."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: np.ndarray | None = None
        """None for an array of text or objects, and before the state is set."""

    def __setstate__(self, state: object) -> None:
        """Handle the BUILD opcode.

        The state is (version, shape, data type, is in column order, bytes or a list of objects).
        """
        match state:
            case (int(), tuple() as shape, _PickledDtype() as dtype, bool() | int() as by_column, data):
                self.values = dtype.array(data, shape, "F" if by_column else "C")
            case _:
                raise pickle.UnpicklingError("unexpected state of an array")


class _PickledDtype:
    """Data type in a pickle.

    Stands in for NumPy's dtypes. The whole process shares these, so an invalid state would break them everywhere.
    """

    __slots__ = ("_byte_order", "_code")

    def __init__(self, code: str) -> None:
        self._code, self._byte_order = code, "="

    def __setstate__(self, state: object) -> None:
        """Handle the BUILD opcode; the state is (version, byte order, ...). The rest does not matter for numbers."""
        match state:
            case (int(), "<" | ">" | "=" | "|" as byte_order, *_):
                self._byte_order = byte_order
            case _:
                raise pickle.UnpicklingError("unexpected state of a data type")

    def array(self, data: object, shape: tuple[Any, ...], order: Literal["C", "F"]) -> np.ndarray | None:
        """Return the array of these bytes in native byte order, or None if its values are not numbers."""
        if not _NUMERIC.fullmatch(self._code):
            return None
        if isinstance(data, str):  # Python 2 had one type for text and bytes
            data = data.encode("latin1")
        if not isinstance(data, bytes | bytearray) or not all(type(side) is int and side >= 0 for side in shape):
            raise pickle.UnpicklingError("an array has invalid bytes or an invalid shape")
        dtype = np.dtype(self._byte_order + self._code)
        values = np.frombuffer(data, dtype, count=math.prod(shape))
        return np.asarray(values.astype(dtype.newbyteorder("=")).reshape(shape, order=order), order="C")


class _PickledStorage:
    """Storage of a tensor, as `_load_storage` returns it and `_rebuild_tensor` takes it."""

    __slots__ = ("storage",)

    def __init__(self, storage: torch.TypedStorage) -> None:
        self.storage = storage

    def __setstate__(self, state: object) -> None:
        """Raise pickle.UnpicklingError, because a BUILD opcode must not change a storage."""
        raise pickle.UnpicklingError("unexpected state of a tensor storage")


def _dtype(code: object, *_flags: object) -> _PickledDtype:
    if not isinstance(code, str):
        raise pickle.UnpicklingError(f"unexpected name {code!r} of a data type")
    return _PickledDtype(code)


def _reconstruct(*_subtype_shape_and_dtype: object) -> PickledArray:
    """Create an empty array, as pickles up to protocol 4 do before they set its state."""
    return PickledArray()


def _frombuffer(data: object, dtype: object, shape: object, order: object) -> PickledArray:
    """Create an array from a pickle of protocol 5."""
    array = PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _scalar(*_dtype_and_bytes: object) -> None:
    """Return None for a NumPy scalar, which is not a weight."""


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """Return bytes, which pickles of protocol 2 write as encoded text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"unexpected encoding {encoding!r} of bytes")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Return empty bytes, which pickles of protocol 2 write as a call of `bytes`."""
    return b""


def _load_storage(data: object) -> _PickledStorage:
    """Safe stand-in for torch.storage._load_from_bytes, which unpickles nested data."""
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("a tensor storage has no bytes")
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.TypedStorage):  # for example a function that torch's reader allows
        raise pickle.UnpicklingError(f"unexpected {type(storage).__name__} as a tensor storage")
    return _PickledStorage(storage)


def _rebuild_tensor(storage: object, offset: int, size: Any, stride: Any, *_gradient_and_hooks: object) -> Tensor:
    if not isinstance(storage, _PickledStorage):
        raise pickle.UnpicklingError("a tensor has no storage")
    return torch._utils._rebuild_tensor(storage.storage, offset, size, stride)


def _ndarray(*_arguments: object) -> PickledArray:
    raise pickle.UnpicklingError("unexpected constructor call of an array")


_NUMPY = {
    ("multiarray", "_reconstruct"): _reconstruct,
    ("multiarray", "scalar"): _scalar,
    ("numeric", "_frombuffer"): _frombuffer,
}
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _dtype,
    **{
        (f"{core}.{module}", name): make
        for core in ("numpy.core", "numpy._core")
        for (module, name), make in _NUMPY.items()
    },
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch.storage", "_load_from_bytes"): _load_storage,
}
"""Every name that a pickle of arrays and tensors may use, with its stand-in."""


class _Constructor:
    """Wrapper around a function. Without it, a BUILD opcode could change the function's defaults and attributes."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        """Raise pickle.UnpicklingError, because a BUILD opcode must not change a constructor."""
        raise pickle.UnpicklingError("unexpected state of a constructor")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of arrays and tensors. It rejects every name outside `_ALLOWED` without looking it up."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a new constructor for an allowed name. Raises pickle.UnpicklingError for other names."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _Constructor(_ALLOWED[module, name])
