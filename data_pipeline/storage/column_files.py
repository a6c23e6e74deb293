"""Arrays of many keys in parquet files, for data that exceed memory and are used one column at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_KEY = "key"
"""Column with the integer key."""


class ColumnFiles:
    """Named one-dimensional arrays per integer key, stored in a folder.

    Each `write` makes one parquet file, in which each array is a list.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, rows: Mapping[int, Mapping[str, np.ndarray]]) -> None:
        """Store the arrays of one or more keys. All keys have the same columns with the same types."""
        first = next(iter(rows.values()))
        columns: dict[str, pa.Array] = {_KEY: pa.array(rows, type=pa.int64())}
        for name in first:
            arrays = [row[name] for row in rows.values()]
            offsets = np.cumsum([0, *map(len, arrays)])
            columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))
        path = self._folder / f"{len(self._paths):06d}.parquet"
        pq.write_table(pa.table(columns), path)
        self._paths.append(path)

    def column(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each key with its array of one column, file by file."""
        for path in self._paths:
            yield from _lists(pq.read_table(path, columns=[_KEY, name]))

    def rows(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield each key with its arrays of all columns, file by file."""
        for path in self._paths:
            table = pq.read_table(path)
            keys, names = table[_KEY].to_pylist(), [name for name in table.column_names if name != _KEY]
            columns = [[values for _, values in _lists(table.select([_KEY, name]))] for name in names]
            yield from ((key, dict(zip(names, row, strict=True))) for key, *row in zip(keys, *columns, strict=True))


def _lists(table: pa.Table) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the keys and arrays of a table that has the key and one more column."""
    for keys, lists in zip(*(column.chunks for column in table.combine_chunks().columns), strict=True):
        offsets = lists.offsets.to_numpy()
        values = lists.values.to_numpy(zero_copy_only=False)
        bounds = pairwise(offsets.tolist())
        yield from ((key, values[a:b]) for key, (a, b) in zip(keys.to_pylist(), bounds, strict=True))
