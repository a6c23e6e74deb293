"""The manifest of a sharded data set: the byte range and the content of each sample.

dataset.json      format, fingerprint, categories, and shards with size and sha256; written last, so its presence
                  means that all other files are complete
samples.parquet   one row per sample, see SAMPLE_SCHEMA
shards/00000.tar  plain WebDataset tars
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.errors import DataError, MissingObjectError, StorageError
from m2f.data_pipeline.keys import check_key
from m2f.data_pipeline.partition import find_runs
from m2f.data_pipeline.sample import Annotation, DecodedSample
from m2f.data_pipeline.shards import codec
from m2f.data_pipeline.shards.columns import SAMPLES_FILE, Columns
from m2f.data_pipeline.shards.external_tars import (
    FORMAT_MEMBER,
    IDENTITY_MEMBER,
    ExternalFormat,
    encode_format,
    encode_identity,
    format_from_json,
)
from m2f.data_pipeline.storage.object_info import ObjectInfo
from m2f.data_pipeline.storage.storage import Storage, join

FORMAT = 1
"""Version of the two files. Manifests of other versions are refused."""
DATASET_FILE = "dataset.json"
"""Name of the file in the folder of a data set. The other file is SAMPLES_FILE."""
INDEXED_PLAN_PREFIX = "adopted-"
"""Prefix of `plan` for indexed tars. It distinguishes them from shards of `m2f shard`."""

_CHECK_THREADS = 16
"""Threads that request the sizes of shards, to hide the latency of an object store."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One tar of the data set."""

    name: str
    """Path relative to the folder of the data set; a URL or absolute path for indexed tars outside it."""
    size: int
    """Size in bytes."""
    sha256: str
    num_samples: int


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of different lengths in one flat array."""

    values: np.ndarray
    """[sum of lengths] concatenated rows."""
    offsets: np.ndarray
    """[rows + 1] int64; row i is values[offsets[i]:offsets[i + 1]]."""

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def rows(self) -> np.ndarray:
        """Return [sum of lengths]: the row number of each value."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def any(self, flags: np.ndarray) -> np.ndarray:
        """Return [rows] bool: whether any value of the row has its flag set. `flags` has one bool per value."""
        has_flag = np.logical_or.reduceat(np.append(flags, False), self.offsets[:-1])
        return has_flag & (np.diff(self.offsets) > 0)


@dataclass(frozen=True, slots=True)
class CategoryStatistics:
    """Numbers of images, segments and pixels of one category, without crowds."""

    category: Category
    num_images: int
    num_segments: int
    num_pixels: int
    """Pixels counted in the maps; for old manifests without counts, the areas stated by the source."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """An opened data set. Arrays have one entry per sample, N in total, in the order of the shards."""

    url: str
    """Folder of the data set."""
    fingerprint: str
    """Hex digest of the format, the categories, and the shards with their checksums."""
    plan: str
    """Hash of the shard plan by which the data set was written; for indexed tars, `adopted-` and a hash of them."""
    categories: CategoryTable
    external_format: ExternalFormat | None = None
    """Format of the samples in indexed tars that other programs wrote; None for shards of m2f."""
    shards: tuple[ShardInfo, ...]
    columns: Columns
    """Columns that are decoded on first use: keys and categories."""
    shard: np.ndarray
    """[N] int32 index into `shards`."""
    offset: np.ndarray
    """[N] int64 first byte of the sample in its shard."""
    length: np.ndarray
    """[N] int64 number of bytes of the sample."""
    crc32: np.ndarray
    """[N] uint32 checksum of these bytes."""
    image_id: np.ndarray
    """[N] int64 image id; see `Sample.image_id`."""
    height: np.ndarray
    """[N] int32 height in pixels."""
    width: np.ndarray
    """[N] int32 width in pixels."""
    num_segments: np.ndarray
    """[N] int32 number of segments without crowds. A thing in both maps counts once, as an instance."""
    member_names: tuple[str, ...]
    """Distinct extensions of the members in the data set."""
    member_codes: Ragged
    """Members of each sample as indices into `member_names`."""
    member_offsets: Ragged
    """First byte of each member's data, relative to the offset of its sample."""
    member_lengths: Ragged
    """Number of bytes of each member."""

    @property
    def num_samples(self) -> int:
        """Return the number N of samples."""
        return len(self.shard)

    @cached_property
    def key(self) -> np.ndarray:
        """Return [N] keys as str objects. Raises DataError if one is invalid."""
        keys, where = self.columns.texts("key"), join(self.url, SAMPLES_FILE)
        for key in keys:
            check_key(key, where)
        return keys

    @cached_property
    def category_ids(self) -> Ragged:
        """Return the source ids of the categories in each sample, ascending and without crowds."""
        bounds = self.columns.bounds("category_ids")
        ids = Ragged(self.columns.items("category_ids", bounds), bounds)
        self.columns.release_memory()
        return ids

    @cached_property
    def category_counts(self) -> Ragged:
        """Return the number of segments of each entry of `category_ids`."""
        return self._by_category("category_counts")

    @cached_property
    def category_areas(self) -> Ragged:
        """Return the area of each entry of `category_ids`, as stated by the source."""
        return self._by_category("category_areas")

    @cached_property
    def category_pixels(self) -> Ragged | None:
        """Return the pixels of each entry of `category_ids`, counted in the maps; None for old manifests."""
        if not self.columns.has("category_pixels"):
            return None
        return self._by_category("category_pixels")

    def _by_category(self, name: str) -> Ragged:
        return Ragged(self.columns.items(name, self.category_ids.offsets), self.category_ids.offsets)

    @classmethod
    def load(cls, url: str, storage: Storage) -> Self:
        """Open the folder of a data set.

        Raises:
            DataError: the data set is missing, unfinished, damaged or of another format version.
            StorageError: samples.parquet is missing, or the store cannot be read.
        """
        document = read_document(url, storage)
        if document is None:
            raise DataError(f"{join(url, DATASET_FILE)} does not exist; write the shards first (m2f shard)")
        data = storage.get(join(url, SAMPLES_FILE))
        samples = document.get("samples")
        if not isinstance(samples, dict) or samples.get("sha256") != hashlib.sha256(data).hexdigest():
            raise DataError(
                f"{join(url, SAMPLES_FILE)} does not match its checksum in {DATASET_FILE}; restore it, or run "
                "`m2f shard` or `m2f index` again, which writes it again"
            )
        try:
            manifest = cls._from_document(url, document, Columns(data))
        except (LookupError, TypeError, ValueError, AttributeError, OSError, pa.ArrowException) as error:
            raise DataError(
                f"{url}: {DATASET_FILE} and {SAMPLES_FILE} have invalid content ({error!r:.200}); restore them or "
                "write the data set again"
            ) from error
        for shard in manifest.shards:
            if not _is_absolute(shard.name):
                check_key(shard.name, join(url, DATASET_FILE))
        return manifest

    @classmethod
    def _from_document(cls, url: str, document: dict[str, Any], columns: Columns) -> Self:
        columns.check()
        names, codes = columns.member_names()
        members = columns.bounds("member_names")
        manifest = cls(
            url=url,
            fingerprint=document["fingerprint"],
            plan=document["plan"],
            categories=_categories_from_json(document["categories"]),
            external_format=None if document.get("foreign") is None else format_from_json(document["foreign"]),
            shards=tuple(_shard_from_json(entry) for entry in document["shards"]),
            columns=columns,
            shard=columns.numbers("shard", np.int32),
            offset=columns.numbers("offset", np.int64),
            length=columns.numbers("length", np.int64),
            crc32=columns.numbers("crc32", np.uint32),
            image_id=columns.numbers("image_id", np.int64),
            height=columns.numbers("height", np.int32),
            width=columns.numbers("width", np.int32),
            num_segments=columns.numbers("num_segments", np.int32),
            member_names=names,
            member_codes=Ragged(codes, members),
            member_offsets=Ragged(columns.items("member_offsets", members), members),
            member_lengths=Ragged(columns.items("member_lengths", members), members),
        )
        columns.release_memory()
        return manifest

    def shard_url(self, shard: int) -> str:
        """Return the path or URL of the shard with this number. Manifests of foreign tars may store absolute ones."""
        name = self.shards[shard].name
        return name if _is_absolute(name) else join(self.url, name)

    def check_shard(self, shard: int, storage: Storage) -> ObjectInfo:
        """Return the size and the ETag of a shard in the store.

        Raises:
            StorageError: the shard is missing, or its size differs from the manifest.
        """
        url, size = self.shard_url(shard), self.shards[shard].size
        info = storage.stat(url)
        if info.size != size:
            raise StorageError(
                f"{url} has {info.size} bytes, but its manifest says {size}: it was truncated or replaced; copy it "
                "again or write the data set again (m2f shard)"
            )
        return info

    def check_shards(self, storage: Storage) -> None:
        """Call `check_shard` for all shards concurrently. Reads no samples."""
        with ThreadPoolExecutor(_CHECK_THREADS) as pool:
            for _ in pool.map(lambda shard: self.check_shard(shard, storage), range(len(self.shards))):
                pass

    def describe(self, index: int) -> str:
        """Return the key, shard URL and offset of a sample as text for messages."""
        location = f"{self.shard_url(int(self.shard[index]))} at byte {self.offset[index]}"
        return f"sample {self.key[index]!r} in {location}"

    def members(self, index: int, data: bytes | memoryview) -> dict[str, bytes]:
        """Split the bytes of a sample into members by extension. Raises DataError if the checksum is wrong."""
        if len(data) != self.length[index] or zlib.crc32(data) != self.crc32[index]:
            raise DataError(
                f"{self.describe(index)} is damaged: its checksum differs from the manifest's; write its shard again, "
                "or restart if the data set was rewritten in the meantime"
            )
        names = (self.member_names[code] for code in self.member_codes[index])
        starts, lengths = self.member_offsets[index].tolist(), self.member_lengths[index].tolist()
        members = {
            name: bytes(data[start : start + length])
            for name, start, length in zip(names, starts, lengths, strict=True)
        }
        return members | self._added_members(index)

    def _added_members(self, index: int) -> dict[str, bytes]:
        """Return what only the manifest states about a sample of indexed tars; nothing for shards of `m2f shard`."""
        if self.external_format is None:
            is_indexed = self.plan.startswith(INDEXED_PLAN_PREFIX)
            return {codec.IMAGE_ID_MEMBER: str(self.image_id[index]).encode()} if is_indexed else {}
        source = self.shards[self.shard[index]].name
        size = int(self.height[index]), int(self.width[index])
        identity = encode_identity(str(self.key[index]), int(self.image_id[index]), source, *size)
        return {FORMAT_MEMBER: self._format_member, IDENTITY_MEMBER: identity}

    @cached_property
    def _format_member(self) -> bytes:
        assert self.external_format is not None
        return encode_format(self.external_format, self.categories)

    def read_members(self, index: int, storage: Storage) -> dict[str, bytes]:
        """Fetch the members of one sample by extension with one ranged read. Raises DataError if it is damaged."""
        url = self.shard_url(int(self.shard[index]))
        return self.members(index, storage.get_range(url, int(self.offset[index]), int(self.length[index])))

    def read_sample(self, index: int, storage: Storage) -> DecodedSample:
        """Fetch, check and decode one sample. Raises DataError if it is damaged."""
        return codec.decode(self.read_members(index, storage))

    def statistics(self) -> tuple[CategoryStatistics, ...]:
        """Return the statistics of all categories in the order of the category table."""
        ids = np.array([category.id for category in self.categories.categories])
        order = np.argsort(ids)
        column = order[np.searchsorted(ids[order], self.category_ids.values)]
        images = np.bincount(column, minlength=len(ids))
        segments = np.bincount(column, self.category_counts.values, minlength=len(ids))
        counted = self.category_areas if self.category_pixels is None else self.category_pixels
        pixels = np.bincount(column, counted.values, minlength=len(ids))
        return tuple(
            CategoryStatistics(category, int(images[i]), int(segments[i]), int(pixels[i]))
            for i, category in enumerate(self.categories.categories)
        )


def read_document(url: str, storage: Storage) -> dict[str, Any] | None:
    """Return the content of `dataset.json` in a data set folder; None if the file does not exist.

    Raises:
        DataError: the file is not valid JSON or has another format version.
    """
    path = join(url, DATASET_FILE)
    try:
        content = storage.get(path)
    except MissingObjectError:
        return None
    try:
        document = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); restore it or write the data set again") from error
    version = document.get("format") if isinstance(document, dict) else None
    if version != FORMAT:
        raise DataError(
            f"{path} has format {version!r}, but this version reads {FORMAT}; use a matching version of m2f"
        )
    return document


def make_document(
    *,
    plan: str,
    source_fingerprint: str,
    categories: CategoryTable,
    shards: Sequence[ShardInfo],
    samples: bytes,
    external_format: ExternalFormat | None = None,
) -> dict[str, Any]:
    """Return the content of `dataset.json`. `samples` are the bytes of samples.parquet."""
    category_list = [{**asdict(c), "color": list(c.color)} for c in categories.categories]
    shard_list = [asdict(shard) for shard in shards]
    format_entry = {} if external_format is None else {"foreign": asdict(external_format)}
    content = json.dumps([FORMAT, category_list, shard_list, *format_entry.values()], sort_keys=True)
    return {
        "format": FORMAT,
        "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
        "plan": plan,
        "source_fingerprint": source_fingerprint,
        "num_samples": sum(shard.num_samples for shard in shards),
        **format_entry,
        "categories": category_list,
        "shards": shard_list,
        "samples": {"name": SAMPLES_FILE, "size": len(samples), "sha256": hashlib.sha256(samples).hexdigest()},
    }


def category_columns(annotation: Annotation) -> dict[str, Any]:
    """Return the columns of SAMPLE_SCHEMA about segments, without crowds.

    A thing in both maps counts once, as an instance.
    """
    pixel_counts = {"seg": _count_pixels(annotation.seg), "inst": _count_pixels(annotation.inst)}
    counts: dict[int, int] = defaultdict(int)
    areas: dict[int, float] = defaultdict(float)
    pixels: dict[int, int] = defaultdict(int)
    for segment in annotation.segments:
        is_duplicate = segment.map == "seg" and segment.is_thing and annotation.inst is not None
        if not segment.is_crowd and not is_duplicate:
            counts[segment.category_id] += 1
            areas[segment.category_id] += segment.area
            pixels[segment.category_id] += pixel_counts[segment.map].get(segment.id, 0)
    ids = sorted(counts)
    return {
        "num_segments": sum(counts.values()),
        "category_ids": ids,
        "category_counts": [counts[i] for i in ids],
        "category_areas": [round(areas[i]) for i in ids],
        "category_pixels": [pixels[i] for i in ids],
    }


def _count_pixels(ids: np.ndarray | None) -> dict[int, int]:
    """Return the number of pixels by id in a map [H, W] or in layers [Y, H, W]."""
    if ids is None or not ids.size:
        return {}
    runs = find_runs(ids.reshape(-1, ids.shape[-1]))
    return dict(enumerate(np.bincount(runs.value, runs.length).astype(np.int64).tolist()))


def write_table(table: pa.Table) -> bytes:
    """Return a table as the bytes of a parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _shard_from_json(entry: dict[str, Any]) -> ShardInfo:
    shard = ShardInfo(**entry)
    int(shard.sha256, 16)  # must be hex digits, because it becomes part of file names in the local cache
    return shard


def _is_absolute(name: str) -> bool:
    return name.startswith("/") or "://" in name


def _categories_from_json(entries: list[dict[str, Any]]) -> CategoryTable:
    return CategoryTable(
        tuple(
            Category(e["id"], e["name"], e["is_thing"], (e["color"][0], e["color"][1], e["color"][2])) for e in entries
        )
    )
