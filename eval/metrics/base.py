"""Base of all metric states, which hold records by image id. Merging in any order gives the same bits.

A state never holds sums. It holds one small record of arrays per image, so an image that was evaluated twice counts
once. Reductions read the records in ascending image id, regardless of their origin and order of arrival.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np

from m2f.data_pipeline.storage.column_files import ColumnFiles
from m2f.eval.errors import EvaluationError

UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    MemoryError,  # a damaged header can state any shape
    RuntimeError,  # a flag marks a member as encrypted or as compressed with an unknown method
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
"""Errors that numpy and zipfile raise for data that is not an npz file or is damaged."""


Numbers = dict[str, float | None]
"""Values by name, in per cent; None for an undefined value."""


def percent(share: float | None) -> float | None:
    """Convert a share to per cent. Return None for None and for -1, which COCO uses if there are no annotations."""
    return None if share is None or share < 0 else 100 * share


def column(dtype: str, *row: int, aligned_with: str | None = None) -> dict[str, Any]:
    """Return the metadata of a record's field: an array [rows, *row] of this dtype, with any number of rows per image.

    `aligned_with` marks a float column that older records lack. It names a column with the same number of rows; the
    missing values become NaN.
    """
    return {"dtype": np.dtype(dtype), "row": row, "aligned_with": aligned_with}


@dataclass(frozen=True, eq=False)
class Record:
    """Contribution of one image to a metric. Subclasses are frozen dataclasses whose fields are all `column`s."""

    def __post_init__(self) -> None:
        for spec in fields(self):
            array = np.asarray(getattr(self, spec.name), dtype=spec.metadata["dtype"])
            aligned_with = spec.metadata["aligned_with"]
            if aligned_with is not None and not len(array):
                array = np.full(len(getattr(self, aligned_with)), np.nan)
            object.__setattr__(self, spec.name, array.reshape(-1, *spec.metadata["row"]))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the columns by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def same_as(self, other: Record) -> bool:
        """Return whether both records hold the same bits."""
        mine, theirs = self.arrays(), other.arrays()
        return all(array.tobytes() == theirs[name].tobytes() for name, array in mine.items())

    def digest(self) -> bytes:
        """Return a digest that is equal for records with the same bits."""
        parts = (part for array in self.arrays().values() for part in (len(array).to_bytes(8), array.tobytes()))
        return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


RecordT = TypeVar("RecordT", bound=Record)
ResultT = TypeVar("ResultT", covariant=True)


class MetricState(ABC, Generic[RecordT, ResultT]):
    """Records of one metric by image id. States merge only if their `settings` (JSON values) are equal."""

    name: str
    """Name of the metric, for messages."""

    def __init__(self, record_type: type[RecordT], settings: dict[str, Any]) -> None:
        self._record_type = record_type
        self._settings = settings
        self._records: dict[int, RecordT] = {}
        self._memory_bytes = 0
        self._files: ColumnFiles | None = None
        self._spilled: dict[int, bytes] = {}
        """Digests of the records that are in files, by image id."""

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Ids of the images in this state, in ascending order."""
        return tuple(sorted({*self._records, *self._spilled}))

    @abstractmethod
    def compute(self) -> ResultT:
        """Reduce the records, in ascending image id, to the metric."""

    def add(self, image_id: int, record: RecordT) -> None:
        """Add the record of one image. Raises EvaluationError if a different record of this image exists."""
        self._check_agrees(image_id, record)
        if image_id not in self._records and image_id not in self._spilled:
            self._records[image_id] = record
            self._memory_bytes += sum(array.nbytes for array in record.arrays().values())

    def merge(self, other: Self) -> None:
        """Add the records of another state. Raises EvaluationError if settings or records of an image differ."""
        if self._settings != other._settings:
            raise EvaluationError(
                f"{self.name}: cannot merge states with different settings: {self._settings} and {other._settings}; "
                "evaluate both with the same recipe"
            )
        for image_id, record in other._all_records():
            self._check_agrees(image_id, record)
        for image_id, record in other._all_records():
            self.add(image_id, record)

    def spill(self, folder: Path, threshold_bytes: int) -> None:
        """Move the records to a parquet file under `folder` if they hold more than `threshold_bytes`.

        Metrics stay bit-identical. Afterwards, `record` does not find the moved records.
        """
        if self._memory_bytes <= threshold_bytes:
            return
        if self._files is None:
            self._files = ColumnFiles(folder)
        self._files.write({i: {n: a.ravel() for n, a in r.arrays().items()} for i, r in self._records.items()})
        self._spilled |= {image_id: record.digest() for image_id, record in self._records.items()}
        self._records, self._memory_bytes = {}, 0

    def _check_agrees(self, image_id: int, record: RecordT) -> None:
        """Raise EvaluationError if the state has a different record of this image."""
        known, spilled = self._records.get(image_id), self._spilled.get(image_id)
        changed = known is not None and not known.same_as(record)
        if changed or (spilled is not None and spilled != record.digest()):
            raise EvaluationError(
                f"{self.name}: image {image_id} was evaluated twice with different results; two images share the id, "
                "or the checkpoint or the data changed in between; evaluate again from the start"
            )

    def _all_records(self) -> Iterator[tuple[int, RecordT]]:
        """Yield all records: those in files, part by part, then those in memory."""
        if self._files is not None:
            for image_id, columns in self._files.rows():
                yield image_id, self._record_type(**columns)
        yield from self._records.items()

    def record(self, image_id: int) -> RecordT:
        """Return the record of an image, which must be in memory."""
        return self._records[image_id]

    def rows(self, name: str) -> np.ndarray:
        """Return one column of all images, joined along the rows in ascending image id."""
        spec = self._spec(name)
        arrays = self._column(name)
        empty = np.empty((0, *spec.metadata["row"]), spec.metadata["dtype"])
        return np.concatenate([empty, *(arrays[image_id] for image_id in self.image_ids)])

    def row_counts(self, name: str) -> np.ndarray:
        """Return the number of rows of one column per image: [images] int64, in ascending image id."""
        arrays = self._column(name)
        return np.array([len(arrays[image_id]) for image_id in self.image_ids], dtype=np.int64)

    def _column(self, name: str) -> dict[int, np.ndarray]:
        """Return one column by image id, from memory and files."""
        arrays = {image_id: getattr(record, name) for image_id, record in self._records.items()}
        if self._files is not None:
            row = self._spec(name).metadata["row"]
            arrays |= {image_id: flat.reshape(-1, *row) for image_id, flat in self._files.column(name)}
        return arrays

    def _spec(self, name: str) -> Field[Any]:
        return next(f for f in fields(self._record_type) if f.name == name)

    def to_bytes(self) -> bytes:
        """Return the state as a compressed npz file without pickles. Equal states give equal bytes."""
        header = np.frombuffer(json.dumps(self._settings, sort_keys=True).encode(), dtype=np.uint8)
        arrays = {"settings": header, "image_ids": np.array(self.image_ids, dtype=np.int64)}
        for spec in fields(self._record_type):
            arrays[f"rows.{spec.name}"] = self.rows(spec.name)
            arrays[f"counts.{spec.name}"] = self.row_counts(spec.name)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, payload: bytes) -> Self:
        """Restore a state from `to_bytes`. Raises EvaluationError for any other content; never unpickles."""
        try:
            with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
                state = cls(**json.loads(arrays["settings"].tobytes()))
                specs = fields(state._record_type)
                names = [f.name for f in specs if f"rows.{f.name}" in arrays or f.metadata["aligned_with"] is None]
                parts = [np.split(arrays[f"rows.{n}"], np.cumsum(arrays[f"counts.{n}"]))[:-1] for n in names]
                for image_id, *columns in zip(arrays["image_ids"].tolist(), *parts, strict=True):
                    state.add(image_id, state._record_type(**dict(zip(names, columns, strict=True))))
        except UNREADABLE as error:
            raise EvaluationError(
                f"{cls.name}: cannot read a stored state from {len(payload)} bytes ({error}); evaluate again"
            ) from error
        return state
