"""The manifest of a sharded data set: where every sample lies, byte by byte, and what is in it.

dataset.json      format, fingerprint, categories, shards with size and sha256; written last, so its presence means
                  that everything else is there
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
from m2f.data_pipeline.shards.foreign import FORM, IDENTITY, ForeignForm, form_from_json, form_member, identity_member
from m2f.data_pipeline.storage.object_info import ObjectInfo
from m2f.data_pipeline.storage.storage import Storage, join

FORMAT = 1
"""Version of the two files; a manifest with another one is refused."""
DATASET_FILE = "dataset.json"
"""Name of the file below the data set's folder; the other one is SAMPLES_FILE."""

_CHECKS_AT_ONCE = 16
"""Threads that ask for the sizes of shards, to hide the latency of an object store."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One tar of the data set."""

    name: str
    """Path below the data set's folder; a URL or absolute path where an indexed tar lies elsewhere."""
    size: int
    sha256: str
    num_samples: int


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of different lengths in one flat array."""

    values: np.ndarray
    """[sum of lengths]"""
    offsets: np.ndarray
    """[rows + 1] int64; row i is values[offsets[i]:offsets[i + 1]]."""

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def rows(self) -> np.ndarray:
        """[sum of lengths] row number of every value."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def any(self, flags: np.ndarray) -> np.ndarray:
        """[rows] whether a row has a value whose flag (bool, one per value) is set."""
        found = np.logical_or.reduceat(np.append(flags, False), self.offsets[:-1])
        return found & (np.diff(self.offsets) > 0)


@dataclass(frozen=True, slots=True)
class CategoryStatistics:
    """How often one category appears, crowds left out."""

    category: Category
    num_images: int
    num_segments: int
    num_pixels: int
    """Counted where the manifest has counts, else as the source states areas."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """An opened data set. Arrays have one entry per sample, in the order of the shards."""

    url: str
    """Folder of the data set."""
    fingerprint: str
    """Hex digest of the content: categories, shards and their checksums."""
    plan: str
    """Hash of the shard plan that made it."""
    categories: CategoryTable
    foreign: ForeignForm | None = None
    """How to read samples of tars that `m2f index` indexed; None for our own."""
    shards: tuple[ShardInfo, ...]
    columns: Columns
    """What is decoded when it is wanted: keys and categories."""
    shard: np.ndarray
    """[N] int32 index into `shards`"""
    offset: np.ndarray
    """[N] int64 first byte in the shard"""
    length: np.ndarray
    """[N] int64 bytes"""
    crc32: np.ndarray
    """[N] uint32 of those bytes"""
    image_id: np.ndarray
    """[N] int64"""
    height: np.ndarray
    """[N] int32"""
    width: np.ndarray
    """[N] int32"""
    num_segments: np.ndarray
    """[N] int32 without crowds; instances where the sample has both maps of its things"""
    member_names: tuple[str, ...]
    """Extensions that members have anywhere in the data set."""
    member_codes: Ragged
    """Members of a sample as indices into `member_names`."""
    member_offsets: Ragged
    """First byte of each member's data, counted from the sample's offset."""
    member_lengths: Ragged
    """Bytes of each member."""

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.shard)

    @cached_property
    def key(self) -> np.ndarray:
        """[N] str objects. Raises DataError where one may not be used."""
        keys, where = self.columns.texts("key"), join(self.url, SAMPLES_FILE)
        for key in keys:
            check_key(key, where)
        return keys

    @cached_property
    def category_ids(self) -> Ragged:
        """Categories present (source ids, ascending), without crowds."""
        bounds = self.columns.bounds("category_ids")
        ids = Ragged(self.columns.items("category_ids", bounds), bounds)
        self.columns.release_memory()
        return ids

    @cached_property
    def category_counts(self) -> Ragged:
        """Segments of each of `category_ids`."""
        return self._by_category("category_counts")

    @cached_property
    def category_areas(self) -> Ragged:
        """Area of each of `category_ids`, as the source states it."""
        return self._by_category("category_areas")

    @cached_property
    def category_pixels(self) -> Ragged | None:
        """Pixels of each of `category_ids`, as counted in the maps; None where the manifest is too old to have them."""
        if not self.columns.has("category_pixels"):
            return None
        return self._by_category("category_pixels")

    def _by_category(self, name: str) -> Ragged:
        return Ragged(self.columns.items(name, self.category_ids.offsets), self.category_ids.offsets)

    @classmethod
    def load(cls, url: str, storage: Storage) -> Self:
        """Open a data set folder. Raises DataError where it is missing, unfinished, newer than this code or damaged."""
        document = read_document(url, storage)
        if document is None:
            raise DataError(f"{join(url, DATASET_FILE)} does not exist; make the shards first (m2f shard)")
        data = storage.get(join(url, SAMPLES_FILE))
        if hashlib.sha256(data).hexdigest() != document.get("samples", {}).get("sha256"):
            raise DataError(
                f"{join(url, SAMPLES_FILE)} is not the file that {DATASET_FILE} was written with; restore it"
            )
        try:
            opened = cls._of(url, document, Columns(data))
        except (LookupError, TypeError, ValueError, AttributeError, OSError, pa.ArrowException) as error:
            raise DataError(
                f"{url}: {DATASET_FILE} and {SAMPLES_FILE} do not say what they must ({error!r:.200}); restore them or "
                "write the data set again"
            ) from error
        for shard in opened.shards:
            if not _is_elsewhere(shard.name):
                check_key(shard.name, join(url, DATASET_FILE))
        return opened

    @classmethod
    def _of(cls, url: str, document: dict[str, Any], columns: Columns) -> Self:
        columns.check()
        names, codes = columns.member_names()
        members = columns.bounds("member_names")
        opened = cls(
            url=url,
            fingerprint=document["fingerprint"],
            plan=document["plan"],
            categories=_categories_from_json(document["categories"]),
            foreign=None if document.get("foreign") is None else form_from_json(document["foreign"]),
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
        return opened

    def shard_url(self, shard: int) -> str:
        """Full URL of a shard."""
        name = self.shards[shard].name
        return name if _is_elsewhere(name) else join(self.url, name)

    def check_shard(self, shard: int, storage: Storage) -> ObjectInfo:
        """What the store says about a shard. Raises StorageError where it is missing or has another size than here."""
        url, size = self.shard_url(shard), self.shards[shard].size
        info = storage.stat(url)
        if info.size != size:
            raise StorageError(
                f"{url} has {info.size} bytes and {size} by its manifest: it was cut off or replaced; copy it again or "
                "write the data set again (m2f shard)"
            )
        return info

    def check_shards(self, storage: Storage) -> None:
        """`check_shard` for all of them, at once. Reads no sample."""
        with ThreadPoolExecutor(_CHECKS_AT_ONCE) as pool:
            for _ in pool.map(lambda shard: self.check_shard(shard, storage), range(len(self.shards))):
                pass

    def describe(self, index: int) -> str:
        """A sample's name and place, for messages."""
        place = f"{self.shard_url(int(self.shard[index]))} at byte {self.offset[index]}"
        return f"sample {self.key[index]!r} in {place}"

    def members(self, index: int, data: bytes | memoryview) -> dict[str, bytes]:
        """Members by extension from a sample's bytes. Raises DataError where the checksum differs."""
        if len(data) != self.length[index] or zlib.crc32(data) != self.crc32[index]:
            raise DataError(
                f"{self.describe(index)} is damaged: its checksum differs from the manifest's; write it again, or "
                "start again if the data set was written again in the meantime"
            )
        names = (self.member_names[code] for code in self.member_codes[index])
        starts, lengths = self.member_offsets[index].tolist(), self.member_lengths[index].tolist()
        members = {
            name: bytes(data[start : start + length])
            for name, start, length in zip(names, starts, lengths, strict=True)
        }
        return members if self.foreign is None else members | self._foreign_members(index)

    def _foreign_members(self, index: int) -> dict[str, bytes]:
        source = self.shards[self.shard[index]].name
        size = int(self.height[index]), int(self.width[index])
        identity = identity_member(str(self.key[index]), int(self.image_id[index]), source, *size)
        return {FORM: self._form_member, IDENTITY: identity}

    @cached_property
    def _form_member(self) -> bytes:
        assert self.foreign is not None
        return form_member(self.foreign, self.categories)

    def read_members(self, index: int, storage: Storage) -> dict[str, bytes]:
        """Fetch one sample's members by extension with one ranged read."""
        url = self.shard_url(int(self.shard[index]))
        return self.members(index, storage.get_range(url, int(self.offset[index]), int(self.length[index])))

    def read_sample(self, index: int, storage: Storage) -> DecodedSample:
        """Fetch, check and decode one sample."""
        return codec.decode(self.read_members(index, storage))

    def statistics(self) -> tuple[CategoryStatistics, ...]:
        """How often every category appears, in the order of the category table."""
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
    """`dataset.json` of a data set folder; None where there is none. Raises DataError where it cannot be used."""
    path = join(url, DATASET_FILE)
    try:
        content = storage.get(path)
    except MissingObjectError:
        return None
    try:
        document = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); restore it or write the data set again") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise DataError(f"{path} has format {found!r}, and this version reads {FORMAT}; use a matching version of m2f")
    return document


def make_document(
    *,
    plan: str,
    source_fingerprint: str,
    categories: CategoryTable,
    shards: Sequence[ShardInfo],
    samples: bytes,
    foreign: ForeignForm | None = None,
) -> dict[str, Any]:
    """Content of `dataset.json`."""
    listed = [{**asdict(c), "color": list(c.color)} for c in categories.categories]
    shard_list = [asdict(shard) for shard in shards]
    form = {} if foreign is None else {"foreign": asdict(foreign)}
    content = json.dumps([FORMAT, listed, shard_list, *form.values()], sort_keys=True)
    return {
        "format": FORMAT,
        "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
        "plan": plan,
        "source_fingerprint": source_fingerprint,
        "num_samples": sum(shard.num_samples for shard in shards),
        **form,
        "categories": listed,
        "shards": shard_list,
        "samples": {"name": SAMPLES_FILE, "size": len(samples), "sha256": hashlib.sha256(samples).hexdigest()},
    }


def category_columns(annotation: Annotation) -> dict[str, Any]:
    """What SAMPLE_SCHEMA says about segments, crowds left out. A thing in both maps counts once, as instance."""
    pixels_of = {"seg": _count_pixels(annotation.seg), "inst": _count_pixels(annotation.inst)}
    counts: dict[int, int] = defaultdict(int)
    areas: dict[int, float] = defaultdict(float)
    pixels: dict[int, int] = defaultdict(int)
    for segment in annotation.segments:
        twice = segment.map == "seg" and segment.is_thing and annotation.inst is not None
        if not segment.is_crowd and not twice:
            counts[segment.category_id] += 1
            areas[segment.category_id] += segment.area
            pixels[segment.category_id] += pixels_of[segment.map].get(segment.id, 0)
    ids = sorted(counts)
    return {
        "num_segments": sum(counts.values()),
        "category_ids": ids,
        "category_counts": [counts[i] for i in ids],
        "category_areas": [round(areas[i]) for i in ids],
        "category_pixels": [pixels[i] for i in ids],
    }


def _count_pixels(ids: np.ndarray | None) -> dict[int, int]:
    """Pixels of every id in a map [H, W] or in layers [Y, H, W]."""
    if ids is None or not ids.size:
        return {}
    runs = find_runs(ids.reshape(-1, ids.shape[-1]))
    return dict(enumerate(np.bincount(runs.value, runs.length).astype(np.int64).tolist()))


def write_table(table: pa.Table) -> bytes:
    """A parquet file of sample rows."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _shard_from_json(entry: dict[str, Any]) -> ShardInfo:
    shard = ShardInfo(**entry)
    int(shard.sha256, 16)  # it names files of the local cache
    return shard


def _is_elsewhere(name: str) -> bool:
    return name.startswith("/") or "://" in name


def _categories_from_json(entries: list[dict[str, Any]]) -> CategoryTable:
    return CategoryTable(
        tuple(
            Category(e["id"], e["name"], e["is_thing"], (e["color"][0], e["color"][1], e["color"][2])) for e in entries
        )
    )
