"""Write a manifest for existing WebDataset tars of m2f or of other programs. Tars are read once and never changed.

The manifest may be in any folder. It names tars in its own folder by relative path, all others by URL or absolute path.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.errors import DataError, StorageError, format_list
from m2f.data_pipeline.image_file import BrokenImageError, frame_orientation, read_header
from m2f.data_pipeline.keys import check_key
from m2f.data_pipeline.readers.custom import check_annotation
from m2f.data_pipeline.readers.files import check_image, require_size
from m2f.data_pipeline.shards import codec, manifest
from m2f.data_pipeline.shards.columns import SAMPLE_SCHEMA
from m2f.data_pipeline.shards.external_tars import ExternalFormat, Labels, decode_labels, image_extension
from m2f.data_pipeline.shards.faults import Fault, parse_fault
from m2f.data_pipeline.shards.manifest import INDEXED_PLAN_PREFIX, ShardInfo, category_columns
from m2f.data_pipeline.shards.publish import publish
from m2f.data_pipeline.shards.tar_walk import TarSample, walk_tar
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.data_pipeline.storage.stream import ObjectStream

OnProgress = Callable[[int, int], None]
"""Callback with the numbers of samples and bytes read since the last call; runs in the caller's thread."""

_PROGRESS_INTERVAL_S = 0.5
"""Seconds between checks for progress while tars are read, at most."""
_DEFAULT_VOID: dict[Labels, set[int]] = {"classes": {255}, "instances": {0, 255}, "panoptic": set()}
"""Labels that are void by convention, for each kind of label map."""


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """The user's description of the tars. Shards written by m2f need only the categories."""

    categories: CategoryTable
    void: frozenset[int] = frozenset()
    """Labels of pixels without a class. The usual ones (classes: 255; instances: 0 and 255) are added unless they are
    categories."""
    labels: Labels | None = None
    """Content of the label map in tars of other programs; see `ExternalFormat.labels`."""
    image: str = "jpg"
    """Extension of the image. `jpg` and `jpeg` stand for both."""
    map: str = "png"
    """Extension of the label map."""
    json: str = "json"
    """Extension of the JSON member with `segments_info`, for `labels` panoptic."""
    max_pixels: int
    """Images with more pixels are refused."""


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """Result of indexing."""

    form: ExternalFormat | Literal["m2f"]
    num_samples: int
    num_shards: int
    num_bytes: int
    faults: tuple[Fault, ...]
    """Samples and tars that could not be indexed."""
    renumbered: bool
    """Whether image ids in shards of m2f repeat. The positions of the samples in the manifest replace all of them."""
    committed: bool
    """Whether the manifest was written."""


def find_tars(urls: Iterable[str], storage: Storage) -> tuple[str, ...]:
    """Return the URLs of the given tars and of all tars in the given folders.

    Raises:
        DataError: no tar is found, or one is given twice.
    """
    tars: list[str] = []
    for url in urls:
        absolute = url if "://" in url else str(Path(url).expanduser().absolute())
        if storage.exists(absolute):
            tars.append(absolute)
        else:
            tars += [name for name in storage.list(absolute, follow_links=True) if name.endswith(".tar")]
    duplicates = [url for url, count in Counter(tars).items() if count > 1]
    if duplicates or not tars:
        problem = (
            f"tars are given twice: {format_list(duplicates)}"
            if duplicates
            else f"no tar was found at {format_list(urls)}"
        )
        raise DataError(f"{problem}; give tars, or folders or s3:// prefixes that contain tars")
    return tuple(tars)


def detect_format(tar: str, options: IndexOptions, storage: Storage) -> ExternalFormat | Literal["m2f"]:
    """Return how to read the tars: `m2f` if the first sample was written by m2f, otherwise the format in the options.

    Raises:
        DataError: the options lack `labels`, or name members that the first sample lacks. The message lists the
            members of that sample.
    """
    first = _first_sample(tar, storage)
    members = first.contents()
    if "json" in members and _is_m2f_sample(members):
        return "m2f"
    images = ("jpg", "jpeg") if options.image in ("jpg", "jpeg") else (options.image,)
    expected = [images, (options.map,), *([(options.json,)] if options.labels == "panoptic" else [])]
    if options.labels is None or not all(members.keys() & set(extensions) for extensions in expected):
        raise DataError(
            f"{tar}: sample {first.key!r} was not written by m2f; its members are "
            f"{format_list(sorted(members), 10)}. Give --labels "
            f"(now {options.labels}), and the extensions of its image with --image (now {options.image}), of "
            f"its map with --map (now {options.map}) and, for --labels panoptic, of the JSON with `segments_info` "
            f"with --json (now {options.json}). Maps with a colour per class, polygons and boxes cannot be indexed: "
            "convert them to shards (m2f shard)"
        )
    return ExternalFormat(
        labels=options.labels,
        images=images,
        map=options.map,
        json=options.json if options.labels == "panoptic" else None,
        void=tuple(sorted(options.void | (_DEFAULT_VOID[options.labels] - options.categories.by_id.keys()))),
    )


def index_tars(
    tars: Sequence[str],
    target: str,
    tar_format: ExternalFormat | Literal["m2f"],
    options: IndexOptions,
    storage: Storage,
    *,
    skip_bad: bool = False,
    threads: int = 1,
    on_progress: OnProgress | None = None,
) -> IndexReport:
    """Read all tars and write their manifest into the folder `target`.

    If there are faults, the manifest is written only with `skip_bad`, and leaves out the faulty samples. An unreadable
    tar is reported as a fault. If the manifest exists already, samples.parquet is restored if it is missing or damaged.

    Raises:
        DataError: the target holds another data set, or no sample is usable.
        StorageError: the manifest cannot be written.
    """
    indexer = _TarIndexer(target, tar_format, options, storage)
    existing = manifest.read_document(target, storage)
    if existing is not None and not existing["plan"].startswith(INDEXED_PLAN_PREFIX):
        raise DataError(f"{target} already contains another data set; choose another folder, or delete it first")
    indexed, duplicates = _drop_duplicate_keys(_index_in_threads(indexer, tars, threads, on_progress))
    faults = [fault for tar in indexed for fault in tar.faults] + duplicates
    non_empty = [tar for tar in indexed if tar.rows]
    if not non_empty:
        listed = "\n".join(f"  {fault}" for fault in faults[:10])
        raise DataError(f"{target}: none of the samples in {len(tars)} tars can be used\n{listed}")
    renumbered = _number_images([row for tar in non_empty for row in tar.rows])
    committed = skip_bad or not faults
    if committed:
        _commit(non_empty, target, tar_format, options.categories, storage)
    return IndexReport(
        form=tar_format,
        num_samples=sum(len(tar.rows) for tar in non_empty),
        num_shards=len(non_empty),
        num_bytes=sum(tar.info.size for tar in non_empty),
        faults=tuple(faults),
        renumbered=renumbered,
        committed=committed,
    )


@dataclass(frozen=True)
class _IndexedTar:
    """Result of reading one tar."""

    info: ShardInfo
    rows: list[dict[str, Any]]
    faults: list[Fault]


class _TarIndexer:
    """Reads and checks tars. Called by several threads."""

    def __init__(
        self, target: str, tar_format: ExternalFormat | Literal["m2f"], options: IndexOptions, storage: Storage
    ) -> None:
        self._target, self._format, self._options, self._storage = target, tar_format, options, storage
        self.counts: list[tuple[int, int]] = []

    def read_tar(self, url: str) -> _IndexedTar:
        rows, faults = [], []
        name = url.removeprefix(join(self._target, "")) if url.startswith(join(self._target, "")) else url
        try:
            stream = ObjectStream(url, self._storage)
            for item in walk_tar(stream):
                if isinstance(item, Fault):
                    faults.append(item)
                    continue
                self.counts.append((1, len(item.data)))
                try:
                    rows.append(self._manifest_row(item, name))
                except DataError as error:
                    fault = parse_fault(url, str(error))
                    faults.append(Fault(**{**asdict(fault), "key": item.key, "offset": item.offset}))
            sha256 = stream.finish()
        except StorageError as error:
            return _IndexedTar(ShardInfo(name, 0, "", 0), [], [parse_fault(url, str(error))])
        return _IndexedTar(ShardInfo(name, stream.size, sha256, len(rows)), rows, faults)

    def _manifest_row(self, sample: TarSample, tar: str) -> dict[str, Any]:
        """Decode image and labels of a sample and return its row for the manifest. Raises DataError."""
        members, where = sample.contents(), f"sample {sample.key!r} ({tar})"
        key, image_id = sample.key, None
        if self._format == "m2f":
            decoded = codec.decode(members)
            key, image_id, annotation, size = decoded.key, decoded.image_id, decoded.annotation, decoded.size
            check_annotation(annotation, self._options.categories, where)
        else:
            size = self._label_size(members, self._format, where)
            annotation = decode_labels(members, self._format, self._options.categories, size, where)
            image = members[image_extension(members, self._format, where)]
            check_image(image, *size, self._options.max_pixels, where)
        return {
            "key": check_key(key, where),
            "offset": sample.offset,
            "length": len(sample.data),
            "crc32": zlib.crc32(sample.data),
            "image_id": image_id,
            "height": size[0],
            "width": size[1],
            "member_names": list(sample.members),
            "member_offsets": [start for start, _ in sample.members.values()],
            "member_lengths": [length for _, length in sample.members.values()],
            **category_columns(annotation),
        }

    def _label_size(self, members: dict[str, bytes], tar_format: ExternalFormat, where: str) -> tuple[int, int]:
        """Return height and width of the labels, after checking the headers of labels and image. Raises DataError."""
        try:
            if tar_format.map not in members:
                raise BrokenImageError(f"it has no label member {tar_format.map}")
            labels = read_header(members[tar_format.map])
            require_size(labels, self._options.max_pixels)
            image = read_header(members[image_extension(members, tar_format, where)])
            frame_orientation(image, labels.height, labels.width)
        except BrokenImageError as error:
            raise DataError(f"{where}: {error}") from error
        return labels.height, labels.width


def _index_in_threads(
    indexer: _TarIndexer, tars: Sequence[str], threads: int, on_progress: OnProgress | None
) -> list[_IndexedTar]:
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(indexer.read_tar, tar) for tar in tars]
        running: set[Future[_IndexedTar]] = set(futures)
        while running:
            _, running = wait(running, _PROGRESS_INTERVAL_S, FIRST_COMPLETED)
            while indexer.counts:
                count = indexer.counts.pop()
                if on_progress is not None:
                    on_progress(*count)
        return [future.result() for future in futures]


def _drop_duplicate_keys(tars: Sequence[_IndexedTar]) -> tuple[list[_IndexedTar], list[Fault]]:
    """Return the tars without the samples whose key occurred earlier, and those samples as faults."""
    first: dict[str, str] = {}
    kept, faults = [], []
    for tar in tars:
        rows = []
        for row in tar.rows:
            key, name = row["key"], tar.info.name
            if key not in first:
                first[key] = name
                rows.append(row)
                continue
            problem = f"a sample of {first[key]} has the same key"
            faults.append(
                Fault(object=name, key=key, offset=row["offset"], problem=problem, remedy="rename one of them")
            )
        kept.append(replace(tar, rows=rows))
    return kept, faults


def _number_images(rows: Sequence[dict[str, Any]]) -> bool:
    """Set the image ids of the rows to their positions if they have none, or if two are equal.

    Metrics are keyed by image id. Shards of m2f from two sources often repeat ids, because many readers count from 0.

    Returns:
        Whether image ids were replaced.
    """
    ids = {row["image_id"] for row in rows}
    if None not in ids and len(ids) == len(rows):
        return False
    for number, row in enumerate(rows):
        row["image_id"] = number
    return None not in ids


def _commit(
    tars: Sequence[_IndexedTar],
    target: str,
    tar_format: ExternalFormat | Literal["m2f"],
    categories: CategoryTable,
    storage: Storage,
) -> None:
    rows = [{**row, "shard": shard} for shard, tar in enumerate(tars) for row in tar.rows]
    samples = manifest.write_table(pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA))
    shards = [ShardInfo(t.info.name, t.info.size, t.info.sha256, len(t.rows)) for t in tars]
    external_format = None if tar_format == "m2f" else tar_format
    description = json.dumps(
        [[asdict(shard) for shard in shards], None if external_format is None else asdict(external_format)]
    )
    document = manifest.make_document(
        plan=f"{INDEXED_PLAN_PREFIX}{hashlib.sha256(description.encode()).hexdigest()}",
        source_fingerprint="",
        categories=categories,
        shards=shards,
        samples=samples,
        external_format=external_format,
    )
    publish(target, document, samples, storage)


def _first_sample(tar: str, storage: Storage) -> TarSample:
    faults = []
    for item in walk_tar(ObjectStream(tar, storage)):
        if isinstance(item, TarSample):
            return item
        faults.append(item)
    raise DataError(str(faults[0]) if faults else f"{tar} contains no sample; leave it out")


def _is_m2f_sample(members: dict[str, bytes]) -> bool:
    try:
        codec.decode(members)
    except DataError:
        return False
    return True
