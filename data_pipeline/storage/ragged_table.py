"""Arrays by row as the bytes of one parquet file: numbers and words, and any number of values per row."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.storage.bounded_parquet import read_bounded_table


@dataclass(frozen=True, eq=False)
class Ragged:
    """Any number of values per row, joined."""

    values: np.ndarray
    """[V]"""
    counts: np.ndarray
    """[rows] int64; they add up to V."""

    @property
    def rows(self) -> np.ndarray:
        """[V] int64 row of every value."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


Columns = Mapping[str, "np.ndarray | Ragged"]
"""By name; all with the same number of rows. NaN among floats stands for no value."""


def table_bytes(columns: Columns) -> bytes:
    """A parquet file; other programs read `Ragged` columns as lists, and NaN as null."""
    arrays = {name: _array(column) for name, column in columns.items()}
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays), buffer, compression="zstd")
    return buffer.getvalue()


def read_table_bytes(payload: bytes) -> dict[str, np.ndarray | Ragged]:
    """What `table_bytes` wrote. Raises DataError for anything else, also where few bytes stand for many values."""
    try:
        table = read_bounded_table(payload).combine_chunks()
        return {name: _column(table[name]) for name in table.column_names}
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise DataError(f"{len(payload)} bytes are no table in parquet format: {error}") from error


def _array(column: np.ndarray | Ragged) -> pa.Array:
    if isinstance(column, Ragged):
        return pa.LargeListArray.from_arrays(pa.array(np.cumsum([0, *column.counts.tolist()])), pa.array(column.values))
    return pa.array(column, from_pandas=True)


def _column(column: pa.ChunkedArray) -> np.ndarray | Ragged:
    if pa.types.is_large_list(column.type):
        lists = column.combine_chunks()
        lists = pa.concat_arrays(lists.chunks) if isinstance(lists, pa.ChunkedArray) else lists
        offsets = lists.offsets.to_numpy()
        values = lists.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
        return Ragged(values, np.diff(offsets).astype(np.int64))
    return column.to_numpy()
