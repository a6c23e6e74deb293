"""Parquet files that anybody may have written: what they stand for is checked before anything is decoded.

A megabyte of runs may stand for 10^9 values, and a short code for a text of any length.
"""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_ROWS_AT_ONCE = 4096
_VALUES_PER_BYTE = 2
"""Most values of a column per byte of the file. What we write has a column that hardly compresses, of 4 bytes a row."""
_MOST_VALUES = 1_000_000
"""Allowed besides, for small files."""
_COLUMNS = 4
"""Most values of a whole table, in such columns: lists in files of ours are short, or alone."""
_MOST_COMPRESSED = 100
"""Most bytes that a byte of the file stands for; those that we write stay below 10."""
_ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}
"""What we write; others make long texts of short differences."""
_MOST_FIXED = 64
"""Bytes of a value whose type has a fixed length; a SHA-256 has 32."""


def check_sizes(data: bytes) -> None:
    """Raise ValueError where a column says that it holds much more than the file's bytes can."""
    _check_sizes(pq.read_metadata(pa.BufferReader(data)), len(data))


def read_bounded_table(data: bytes) -> pa.Table:
    """The table in a file.

    Raises:
        ValueError: it says that it holds much more than its bytes can, or texts of it become too long when decoded.
        pa.ArrowException, OSError: it is damaged.
    """
    metadata = pq.read_metadata(pa.BufferReader(data))
    values = _check_sizes(metadata, len(data))
    most = _COLUMNS * _most_values(len(data))
    if sum(values.values()) > most:
        raise ValueError(f"{len(data)} bytes stand for {sum(values.values())} values in all, of up to {most}")
    _check_texts(metadata, data)
    # `pq.read_table` would import pyarrow.dataset.
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


def _check_sizes(metadata: pq.FileMetaData, size: int) -> Counter[str]:
    """Values by column."""
    values, sizes = Counter[str](), 0
    for index in range(metadata.num_columns):
        leaf = metadata.schema.column(index)
        if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" and leaf.length > _MOST_FIXED:
            raise ValueError(f"every value of {leaf.path} has {leaf.length} bytes, more than {_MOST_FIXED}")
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            if not _ENCODINGS.issuperset(chunk.encodings):
                raise ValueError(f"{chunk.path_in_schema} has the encodings {', '.join(chunk.encodings)}")
            values[chunk.path_in_schema] += chunk.num_values
            sizes += chunk.total_uncompressed_size
    most = _most_values(size)
    if max([metadata.num_rows, *values.values()]) > most:
        raise ValueError(f"{size} bytes stand for {metadata.num_rows} rows, of up to {most} values")
    if sizes > _most_bytes(size):
        raise ValueError(f"{size} bytes stand for {sizes}, more than {_MOST_COMPRESSED} times as many")
    return values


def _check_texts(metadata: pq.FileMetaData, data: bytes) -> None:
    """Texts come as codes with a dictionary; what they are without is counted first."""
    leaves = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    names = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=names)
    total = 0
    for column in dict.fromkeys(name.partition(".")[0] for name in names):
        for rows in file.iter_batches(_ROWS_AT_ONCE, columns=[column], use_threads=False):
            total += sum(_decoded_bytes(array) for array in rows.columns)
            if total > _most_bytes(len(data)):
                raise ValueError(f"{len(data)} bytes stand for texts of more than {_MOST_COMPRESSED} times as many")


def _decoded_bytes(array: pa.Array) -> int:
    """Bytes of the texts in an array."""
    if pa.types.is_dictionary(array.type):
        if len(array.dictionary) == 0:
            return 0
        lengths = pc.call_function("binary_length", [array.dictionary]).cast(pa.int64())
        return pc.call_function("sum", [lengths.take(array.indices)]).as_py() or 0
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _decoded_bytes(array.flatten())
    if pa.types.is_struct(array.type):
        return sum(_decoded_bytes(field) for field in array.flatten())
    if pa.types.is_nested(array.type):  # maps and lists of fixed length, which no table of ours has
        raise ValueError(f"a column has texts in a {array.type}")
    return 0


def _most_values(size: int) -> int:
    return _MOST_VALUES + _VALUES_PER_BYTE * size


def _most_bytes(size: int) -> int:
    return _MOST_VALUES + _MOST_COMPRESSED * size
