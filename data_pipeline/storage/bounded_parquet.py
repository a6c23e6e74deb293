"""Untrusted parquet files: the decoded size is checked before anything is decoded.

A megabyte of run lengths can decode to 10^9 values, and a short dictionary code to a text of any length.
"""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BATCH_ROWS = 4096
"""Number of rows per decoding step, so that decoding needs little memory in addition to its result."""
_VALUES_PER_BYTE = 2
"""Largest number of values of a column per byte of the file. Files of m2f have far fewer, because a column with
4 bytes per row hardly compresses."""
_BASE_VALUES = 1_000_000
"""Number of values, and of bytes, that is allowed in addition, for small files."""
_TABLE_FACTOR = 4
"""Limit of the values of a whole table, as a multiple of the limit of a column. Lists in files of m2f are short, or
they are the only column."""
_MAX_COMPRESSION_RATIO = 100
"""Largest number of decoded bytes per byte of the file. Files of m2f stay below 10."""
_ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}
"""Encodings of files of m2f. Delta encodings are refused, because they expand short data to long texts."""
_MAX_FIXED_BYTES = 64
"""Largest number of bytes of a value of a fixed-length type. A SHA-256 has 32."""


def check_sizes(data: bytes) -> None:
    """Raise ValueError if a column claims to hold much more than the bytes of the file can."""
    _check_sizes(pq.read_metadata(pa.BufferReader(data)), len(data))


def read_bounded_table(data: bytes) -> pa.Table:
    """Return the table in the bytes of a parquet file.

    Raises:
        ValueError: the file claims to hold much more than its bytes can, or its decoded texts are too long.
        pa.ArrowException, OSError: the file is damaged.
    """
    metadata = pq.read_metadata(pa.BufferReader(data))
    values = _check_sizes(metadata, len(data))
    limit = _TABLE_FACTOR * _max_values(len(data))
    if sum(values.values()) > limit:
        raise ValueError(f"{len(data)} bytes decode to {sum(values.values())} values in total; the limit is {limit}")
    _check_texts(metadata, data)
    # `pq.read_table` would import pyarrow.dataset.
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


def _check_sizes(metadata: pq.FileMetaData, size: int) -> Counter[str]:
    """Check the sizes in the metadata and return the number of values by column. Raises ValueError."""
    values, sizes = Counter[str](), 0
    for index in range(metadata.num_columns):
        leaf = metadata.schema.column(index)
        if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" and leaf.length > _MAX_FIXED_BYTES:
            raise ValueError(f"every value of {leaf.path} has {leaf.length} bytes, more than {_MAX_FIXED_BYTES}")
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            if not _ENCODINGS.issuperset(chunk.encodings):
                raise ValueError(f"{chunk.path_in_schema} has the unsupported encodings {', '.join(chunk.encodings)}")
            values[chunk.path_in_schema] += chunk.num_values
            sizes += chunk.total_uncompressed_size
    limit = _max_values(size)
    if max([metadata.num_rows, *values.values()]) > limit:
        raise ValueError(f"{size} bytes decode to {metadata.num_rows} rows, with more than {limit} values in a column")
    if sizes > _max_bytes(size):
        raise ValueError(f"{size} bytes decode to {sizes} bytes, more than {_MAX_COMPRESSION_RATIO} times as many")
    return values


def _check_texts(metadata: pq.FileMetaData, data: bytes) -> None:
    """Raise ValueError if the decoded texts are too long. Texts are read as dictionary codes to count their bytes."""
    leaves = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    names = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=names)
    total = 0
    for column in dict.fromkeys(name.partition(".")[0] for name in names):
        for rows in file.iter_batches(BATCH_ROWS, columns=[column], use_threads=False):
            total += sum(_decoded_bytes(array) for array in rows.columns)
            if total > _max_bytes(len(data)):
                raise ValueError(
                    f"{len(data)} bytes decode to texts of more than {_MAX_COMPRESSION_RATIO} times as many"
                )


def _decoded_bytes(array: pa.Array) -> int:
    """Return the number of bytes of the decoded texts in an array."""
    if pa.types.is_dictionary(array.type):
        if len(array.dictionary) == 0:
            return 0
        lengths = pc.call_function("binary_length", [array.dictionary]).cast(pa.int64())
        return pc.call_function("sum", [lengths.take(array.indices)]).as_py() or 0
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _decoded_bytes(array.flatten())
    if pa.types.is_struct(array.type):
        return sum(_decoded_bytes(field) for field in array.flatten())
    if pa.types.is_nested(array.type):  # maps and lists of fixed length, which tables of m2f do not have
        raise ValueError(f"a column has texts in a {array.type}")
    return 0


def _max_values(size: int) -> int:
    return _BASE_VALUES + _VALUES_PER_BYTE * size


def _max_bytes(size: int) -> int:
    return _BASE_VALUES + _MAX_COMPRESSION_RATIO * size
