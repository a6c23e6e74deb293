"""Read plain pickles of arrays and tensors, such as Detectron2 publishes, without executing what they hold.

A pickle is a program that calls what it names and changes what it has. Whatever one of these may name is replaced by a
stand-in of this module, so that no function, class or data type of the process is within its reach.
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
"""Data types of arrays that are read, as NumPy writes them: float, integers and bool."""


def read_pickle(file: BinaryIO) -> Any:
    """What a pickle holds: plain values, OrderedDicts, tensors and `PickledArray`s.

    Raises pickle.UnpicklingError, naming it, where the pickle asks for anything else.
    """
    return _ArrayUnpickler(file, encoding="latin1").load()  # the encoding of pickles that Python 2 wrote


class PickledArray:
    """An array of a pickle. It has its values once the pickle has given it a state."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: np.ndarray | None = None
        """None for an array of text or objects, and for one without a state."""

    def __setstate__(self, state: object) -> None:
        """What BUILD calls: (version, shape, data type, is in column order, bytes or a list of objects)."""
        match state:
            case (int(), tuple() as shape, _PickledDtype() as dtype, bool() | int() as by_column, data):
                self.values = dtype.array(data, shape, "F" if by_column else "C")
            case _:
                raise pickle.UnpicklingError("an array is given a state that NumPy does not write")


class _PickledDtype:
    """A data type of a pickle. NumPy's own are shared by the process, and an unexpected state breaks them."""

    __slots__ = ("_byte_order", "_code")

    def __init__(self, code: str) -> None:
        self._code, self._byte_order = code, "="

    def __setstate__(self, state: object) -> None:
        """What BUILD calls: (version, byte order, ...), of which the rest matters for other than numbers."""
        match state:
            case (int(), "<" | ">" | "=" | "|" as byte_order, *_):
                self._byte_order = byte_order
            case _:
                raise pickle.UnpicklingError("a data type is given a state that NumPy does not write")

    def array(self, data: object, shape: tuple[Any, ...], order: Literal["C", "F"]) -> np.ndarray | None:
        """The array of these bytes in native byte order; None where its values are no numbers."""
        if not _NUMERIC.fullmatch(self._code):
            return None
        if isinstance(data, str):  # Python 2 had one type for text and bytes
            data = data.encode("latin1")
        if not isinstance(data, bytes | bytearray) or not all(type(side) is int and side >= 0 for side in shape):
            raise pickle.UnpicklingError("an array has no bytes or no shape")
        dtype = np.dtype(self._byte_order + self._code)
        values = np.frombuffer(data, dtype, count=math.prod(shape))
        return np.asarray(values.astype(dtype.newbyteorder("=")).reshape(shape, order=order), order="C")


class _PickledStorage:
    """Memory of a tensor."""

    __slots__ = ("storage",)

    def __init__(self, storage: torch.TypedStorage) -> None:
        self.storage = storage

    def __setstate__(self, state: object) -> None:
        """What BUILD calls."""
        raise pickle.UnpicklingError("the memory of a tensor is given a state")


def _dtype(code: object, *_flags: object) -> _PickledDtype:
    if not isinstance(code, str):
        raise pickle.UnpicklingError(f"a data type has the name {code!r}")
    return _PickledDtype(code)


def _reconstruct(*_subtype_shape_and_dtype: object) -> PickledArray:
    """How pickles up to protocol 4 begin an array, of which they then set the state."""
    return PickledArray()


def _frombuffer(data: object, dtype: object, shape: object, order: object) -> PickledArray:
    """How pickles of protocol 5 write an array."""
    array = PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _scalar(*_dtype_and_bytes: object) -> None:
    """A number of NumPy, which is no weight."""


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """How pickles of protocol 2 write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How pickles of protocol 2 write bytes of length zero."""
    return b""


def _load_storage(data: object) -> _PickledStorage:
    """In place of torch.storage._load_from_bytes, which unpickles nested data."""
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("the memory of a tensor has no bytes")
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.TypedStorage):  # such as one of the functions that torch's own reader allows
        raise pickle.UnpicklingError(f"the memory of a tensor is a {type(storage).__name__}")
    return _PickledStorage(storage)


def _rebuild_tensor(storage: object, offset: int, size: Any, stride: Any, *_gradient_and_hooks: object) -> Tensor:
    if not isinstance(storage, _PickledStorage):
        raise pickle.UnpicklingError("a tensor has no memory")
    return torch._utils._rebuild_tensor(storage.storage, offset, size, stride)


def _ndarray(*_arguments: object) -> PickledArray:
    raise pickle.UnpicklingError("an array is made in a way that NumPy does not write")


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
"""Everything that a pickle may name, what arrays and tensors consist of, and what makes it here."""


class _Constructor:
    """Calls a function in place of the function itself, whose defaults and attributes a BUILD opcode could change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        """What BUILD calls."""
        raise pickle.UnpicklingError("a constructor is given a state")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dictionaries of arrays; whatever else a file names is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        """A new constructor for what a pickle asks for by name."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _Constructor(_ALLOWED[module, name])
