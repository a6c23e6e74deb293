"""Columns of a manifest's samples.parquet, decoded one at a time and with bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.keys import MAX_KEY_LENGTH
from m2f.data_pipeline.storage.bounded_parquet import BATCH_ROWS, check_sizes

SAMPLES_FILE = "samples.parquet"
"""Name of the file in the folder of a data set."""
_TEXT_BYTES = 4 * MAX_KEY_LENGTH
"""Longest text in bytes: a key, with the four bytes that a character of UTF-8 may take."""

SAMPLE_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "shard": pa.int32(),
        "offset": pa.int64(),  # first tar header of the sample in its shard
        "length": pa.int64(),  # bytes of headers, members and padding
        "crc32": pa.uint32(),  # checksum of these bytes
        "image_id": pa.int64(),
        "height": pa.int32(),
        "width": pa.int32(),
        "num_segments": pa.int32(),  # without crowds, like the four columns below
        "category_ids": pa.list_(pa.int32()),
        "category_counts": pa.list_(pa.int32()),
        "category_areas": pa.list_(pa.int64()),  # stated by the source
        "category_pixels": pa.list_(pa.int64()),  # counted in the maps
        "member_names": pa.list_(pa.string()),
        "member_offsets": pa.list_(pa.int64()),  # first byte of the data, relative to `offset`
        "member_lengths": pa.list_(pa.int64()),
    }
)

OPTIONAL_COLUMNS = ("category_pixels",)
"""Columns added after the first version. Files without them are valid."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Access to the columns of samples.parquet as NumPy arrays with narrow types.

    Every rank holds a manifest, so time and memory matter. pyarrow's `read_table` and `to_numpy` would import
    pyarrow.dataset and pandas, and need twice the time and memory. Decoding a few rows at a time is cheaper than
    decoding whole columns.
    """

    data: bytes
    """Content of samples.parquet."""

    def check(self) -> None:
        """Check the schema and the stated sizes without decoding.

        Raises:
            KeyError: a column of SAMPLE_SCHEMA is missing.
            TypeError: a column has another type.
            ValueError: the file claims to hold much more than its bytes can.
        """
        check_sizes(self.data)
        schema = pq.read_schema(pa.BufferReader(self.data))
        for field in SAMPLE_SCHEMA:
            if field.name in OPTIONAL_COLUMNS and field.name not in schema.names:
                continue
            if schema.field(field.name).type != field.type:
                raise TypeError(f"{field.name} is {schema.field(field.name).type}, not {field.type}")

    @property
    def num_rows(self) -> int:
        """Return the number N of samples."""
        return pq.read_metadata(pa.BufferReader(self.data)).num_rows

    def has(self, name: str) -> bool:
        """Return whether the file has a column."""
        return name in pq.read_schema(pa.BufferReader(self.data)).names

    def numbers(self, name: str, dtype: type[np.number]) -> np.ndarray:
        """Return [N] values of a column of numbers as `dtype`. Raises DataError if their number is not N."""
        values = np.concatenate([np.from_dlpack(part).astype(dtype) for part in self._parts(name)])
        if len(values) != self.num_rows:
            raise DataError(
                f"{SAMPLES_FILE}: {name} has {len(values)} values in {self.num_rows} rows; restore the file"
            )
        return values

    def texts(self, name: str) -> np.ndarray:
        """Return [N] str objects of a column of texts.

        Raises:
            DataError: a text has more than _TEXT_BYTES characters, or all texts of a part together are too long. This
                is checked before dictionary codes are expanded.
        """
        texts: list[str | None] = []
        for part in self._parts(name):
            if part.dictionary.nbytes > BATCH_ROWS * _TEXT_BYTES:
                raise DataError(
                    f"{SAMPLES_FILE}: {name} contains texts of more than {_TEXT_BYTES} bytes; restore the file"
                )
            dictionary = part.dictionary.to_pylist()
            if any(text is not None and len(text) > _TEXT_BYTES for text in dictionary):
                raise DataError(
                    f"{SAMPLES_FILE}: {name} contains texts of more than {_TEXT_BYTES} bytes; restore the file"
                )
            texts += [None if code is None else dictionary[code] for code in part.indices.to_pylist()]
        return np.array(texts, dtype=object)

    def items(self, name: str, bounds: np.ndarray) -> np.ndarray:
        """Return the concatenated values of a column of lists, in the smallest integer type that holds them.

        Raises:
            DataError: the lengths of the lists do not match `bounds` [N + 1].
        """
        values, lengths = [], []
        for part in self._parts(name):
            values.append(_to_smallest_dtype(np.from_dlpack(part.flatten())))
            lengths.append(np.diff(np.from_dlpack(part.offsets)))
        if not np.array_equal(np.concatenate(lengths), np.diff(bounds)):
            raise DataError(
                f"{SAMPLES_FILE}: the lists of {name} differ in length from those of other columns; restore it"
            )
        return np.concatenate(values)

    def bounds(self, name: str) -> np.ndarray:
        """Return [N + 1] int64: the bounds of the rows of a column of lists in the result of `items`."""
        lengths = [np.diff(np.from_dlpack(part.offsets)) for part in self._parts(name)]
        return np.concatenate([[0], *lengths]).cumsum(dtype=np.int64)

    def member_names(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the distinct member names, and the concatenated indices into them of all rows."""
        parts = pa.chunked_array([part.flatten() for part in self._parts("member_names")]).unify_dictionaries()
        names = tuple(parts.chunk(0).dictionary.to_pylist())
        return names, np.concatenate([_to_smallest_dtype(np.from_dlpack(part.indices)) for part in parts.chunks])

    def release_memory(self) -> None:
        """Release the memory of decoding, which is as large as the columns that were read."""
        pa.default_memory_pool().release_unused()

    def _parts(self, name: str) -> Iterator[pa.Array]:
        """Yield a column in parts of up to BATCH_ROWS rows. Texts are dictionary-encoded."""
        dictionary_columns = {"member_names": ["member_names.list.element"], "key": ["key"]}.get(name)
        try:
            file = pq.ParquetFile(pa.BufferReader(self.data), read_dictionary=dictionary_columns)
            for rows in file.iter_batches(BATCH_ROWS, columns=[name], use_threads=False):
                yield rows.column(0)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{SAMPLES_FILE}: {name} cannot be decoded ({error}); restore the file") from error


def _to_smallest_dtype(values: np.ndarray) -> np.ndarray:
    """Return the integers in the smallest type that holds them."""
    ends = (values.min(), values.max()) if values.size else (0,)
    return values.astype(np.result_type(*map(np.min_scalar_type, ends)))
