"""Tables as the bytes of a parquet file. A column has one number or text per row, or any number of them (Ragged)."""

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
    """A column with any number of values per row."""

    values: np.ndarray
    """[V] concatenated values of all rows."""
    counts: np.ndarray
    """[rows] int64 number of values of each row; the sum is V."""

    @property
    def rows(self) -> np.ndarray:
        """Return [V] int64: the row of each value."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


Columns = Mapping[str, "np.ndarray | Ragged"]
"""Columns by name, all with the same number of rows. NaN in a column of floats means no value."""


def table_bytes(columns: Columns) -> bytes:
    """Return columns as the bytes of a parquet file. Other programs read `Ragged` as lists and NaN as null."""
    arrays = {name: _array(column) for name, column in columns.items()}
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays), buffer, compression="zstd")
    return buffer.getvalue()


def read_table_bytes(payload: bytes) -> dict[str, np.ndarray | Ragged]:
    """Return the columns in bytes that `table_bytes` wrote.

    Raises:
        DataError: the bytes are not such a table, or decode to far more data than their size allows.
    """
    try:
        table = read_bounded_table(payload).combine_chunks()
        return {name: _column(table[name]) for name in table.column_names}
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise DataError(f"{len(payload)} bytes are not a parquet table: {error}") from error


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
