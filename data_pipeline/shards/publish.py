"""Publication of a manifest: samples.parquet and then dataset.json, and the search for lost files of a data set."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from m2f.data_pipeline.errors import DataError, MissingObjectError, ObjectExistsError
from m2f.data_pipeline.shards.columns import SAMPLES_FILE
from m2f.data_pipeline.shards.manifest import DATASET_FILE, read_document
from m2f.data_pipeline.storage.storage import Storage, join

_THREADS = 16
"""Threads that request the sizes of shards, to hide the latency of an object store."""


def publish(target: str, document: dict[str, Any], samples: bytes, storage: Storage) -> None:
    """Write samples.parquet and then dataset.json, which completes the data set.

    If the data set is already published, this writes nothing, unless samples.parquet is missing or damaged.

    Raises:
        DataError: the target holds another data set.
    """
    existing = find_published(target, document, storage)
    if existing is not None and _has_samples(target, existing, storage):
        return
    storage.put(join(target, SAMPLES_FILE), samples)
    content = json.dumps(document, indent=1).encode()
    try:
        storage.put(join(target, DATASET_FILE), content, if_absent=existing is None)
    except ObjectExistsError:  # another process was faster
        find_published(target, document, storage)


def find_published(target: str, document: dict[str, Any], storage: Storage) -> dict[str, Any] | None:
    """Return dataset.json if this data set is already published; None if the target holds none.

    Raises:
        DataError: the target holds another data set.
    """
    existing = read_document(target, storage)
    if existing is not None and existing["fingerprint"] != document["fingerprint"]:
        raise DataError(
            f"{target} already contains another data set (fingerprint {existing['fingerprint'][:12]}, "
            f"this one {document['fingerprint'][:12]}); choose another folder, or delete it first"
        )
    return existing


def find_lost(target: str, document: dict[str, Any], storage: Storage) -> tuple[str, ...]:
    """Return the names of published files that are missing or damaged.

    These are shards whose size differs from dataset.json, and samples.parquet if its checksum differs.
    """
    shards = document["shards"]
    with ThreadPoolExecutor(_THREADS) as pool:
        intact = pool.map(lambda shard: has_size(join(target, shard["name"]), shard["size"], storage), shards)
        lost = [shard["name"] for shard, is_intact in zip(shards, intact, strict=True) if not is_intact]
    return (*lost, *(() if _has_samples(target, document, storage) else (SAMPLES_FILE,)))


def has_size(url: str, size: int, storage: Storage) -> bool:
    """Return whether an object exists and has this size in bytes."""
    try:
        return storage.size(url) == size
    except MissingObjectError:
        return False


def _has_samples(target: str, document: dict[str, Any], storage: Storage) -> bool:
    """Return whether samples.parquet exists and matches its checksum in dataset.json."""
    try:
        data = storage.get(join(target, SAMPLES_FILE))
    except MissingObjectError:
        return False
    return document["samples"]["sha256"] == hashlib.sha256(data).hexdigest()
