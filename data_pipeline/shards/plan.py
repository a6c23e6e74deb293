"""Shard plans: the assignment of samples to shards, and the claim of a folder by one plan."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import numpy as np

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.documents import DocumentError, parse_json
from m2f.data_pipeline.errors import DataError, MissingObjectError, ObjectExistsError, StorageError
from m2f.data_pipeline.readers import Reader
from m2f.data_pipeline.shards import manifest
from m2f.data_pipeline.shards.columns import SAMPLES_FILE
from m2f.data_pipeline.storage.storage import Storage, check_folder, join

_PLAN_FILE = "plan.json"
_WRITTEN_FILES = re.compile(r"(samples|(parts|sources)/\d{5,})\.parquet|plan\.json|shards/\d{5,}\.tar")
"""Names of the files that sharding writes into the folder of a data set, except the manifest's dataset.json."""
_SIZE_SAMPLES = 512  # number of samples whose sizes estimate the mean size


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Assignment of samples to shards. It depends only on the source, the seed and the shard size."""

    target: str
    """Folder or `s3://` prefix of the data set."""
    shard_keys: tuple[tuple[str, ...], ...]
    """Keys of the samples of each shard, in order."""
    categories: CategoryTable
    source_fingerprint: str
    seed: int

    @property
    def hash(self) -> str:
        """Return a hex digest of everything that determines the content of the shards."""
        content = [manifest.FORMAT, self.shard_keys, asdict(self.categories), self.source_fingerprint, self.seed]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def num_samples(self) -> int:
        """Return the number of samples in all shards."""
        return sum(map(len, self.shard_keys))


def plan_shards(reader: Reader, config: DatasetConfig, fingerprint: str) -> ShardPlan:
    """Permute all samples with the seed and divide them into shards of about `shard_mb`.

    Raises:
        DataError: the source has no sample.
        StorageError: `shards` is empty, or a URL without a bucket.
    """
    check_folder(config.shards)
    keys = reader.keys
    if not keys:
        raise DataError(f"the source of {config.shards} contains no sample")
    order = np.random.Generator(np.random.Philox(config.seed)).permutation(len(keys))
    hints = [reader.size_hint(int(i)) for i in order[:_SIZE_SAMPLES]]
    num_shards = _rounded_shard_count(sum(hints) / len(hints) * len(keys) / (config.shard_mb * 1e6))
    shards = np.array_split(order, min(num_shards, len(keys)))
    return ShardPlan(
        target=config.shards,
        shard_keys=tuple(tuple(keys[i] for i in shard) for shard in shards),
        categories=reader.categories,
        source_fingerprint=fingerprint,
        seed=config.seed,
    )


def keep_written_plan(plan: ShardPlan, storage: Storage, earlier_fingerprint: Callable[[], str]) -> ShardPlan:
    """Return the plan by which the data set in the target was written if it has the same samples, otherwise `plan`.

    The written plan may have another number of shards, because this number depends on the sizes of source files, which
    change if files are deleted or encoded again. If the data set was never complete, its number of shards is not kept,
    because its source may have lacked images.

    The written plan may also have the fingerprint by which earlier versions identified this source.
    `earlier_fingerprint` computes it, and is called only if the plans differ.
    """
    claim = _read_claim(plan, storage)
    if claim is None or claim["plan"] == plan.hash:
        return plan
    if claim.get("source") == (earlier := earlier_fingerprint()):
        plan = replace(plan, source_fingerprint=earlier)
    if not any(storage.exists(join(plan.target, name)) for name in (manifest.DATASET_FILE, SAMPLES_FILE)):
        return plan
    keys = [key for shard in plan.shard_keys for key in shard]
    shards = np.array_split(np.arange(len(keys)), claim["num_shards"])
    kept = replace(plan, shard_keys=tuple(tuple(keys[i] for i in shard) for shard in shards))
    return kept if kept.hash == claim["plan"] else plan


def claim_target(plan: ShardPlan, storage: Storage) -> None:
    """Reserve the target folder for this plan. Raises DataError if another plan has reserved it."""
    try:
        storage.put(join(plan.target, _PLAN_FILE), json.dumps(_claim(plan), indent=1).encode(), if_absent=True)
    except ObjectExistsError:
        claim = _read_claim(plan, storage)
        if claim is not None and claim["plan"] != plan.hash:
            _refuse_target(plan, claim)


def committed_document(plan: ShardPlan, storage: Storage) -> dict[str, Any] | None:
    """Return the content of `dataset.json` of this plan; None if it is not committed yet.

    Raises:
        DataError: the folder belongs to another plan.
    """
    committed = manifest.read_document(plan.target, storage)
    if committed is not None and committed["plan"] != plan.hash:
        _refuse_target(plan, _read_claim(plan, storage) or {"source": committed.get("source_fingerprint")})
    claim = _read_claim(plan, storage)
    if claim is not None and claim["plan"] != plan.hash:
        _refuse_target(plan, claim)
    return committed


def delete_manifest(plan: ShardPlan, storage: Storage) -> None:
    """Delete dataset.json before some shards are written again. Only the next commit completes the data set again.

    Raises:
        StorageError: the store denies deletion.
    """
    _delete_document(plan.target, storage)


def clear_target(target: str, storage: Storage) -> None:
    """Delete the files that sharding wrote into a folder, the manifest first. Other files are kept.

    Raises:
        DataError: the manifest describes tars of other programs, indexed by `m2f index`.
        StorageError: the store denies deletion.
    """
    try:
        document = manifest.read_document(target, storage)
    except DataError:  # an unreadable manifest may be replaced
        document = None
    if document is not None and document.get("foreign") is not None:
        raise DataError(f"{target} has a manifest of `m2f index` for existing tars; choose another folder for shards")
    _delete_document(target, storage)
    root = f"{target.rstrip('/')}/"
    for url in storage.list(target):
        if _WRITTEN_FILES.fullmatch(url.removeprefix(root)):
            storage.delete(url)


def _delete_document(target: str, storage: Storage) -> None:
    """Delete dataset.json. Raises StorageError if it still exists, because shards below it must not be replaced."""
    url = join(target, manifest.DATASET_FILE)
    storage.delete(url)
    if storage.exists(url):
        raise StorageError(
            f"{url} could not be deleted, so no shard was changed: the store denies deletion. Allow it "
            "(s3:DeleteObject), or choose another folder"
        )


def _rounded_shard_count(num_shards: float) -> int:
    """Round a number of shards to steps of 10 %, so that a small change of the source does not change the plan."""
    return max(1, round(1.1 ** round(math.log(max(num_shards, 1)) / math.log(1.1))))


def _claim(plan: ShardPlan) -> dict[str, Any]:
    return {
        "plan": plan.hash,
        "num_shards": len(plan.shard_keys),
        "num_samples": plan.num_samples,
        "seed": plan.seed,
        "source": plan.source_fingerprint,
    }


def _read_claim(plan: ShardPlan, storage: Storage) -> dict[str, Any] | None:
    url = join(plan.target, _PLAN_FILE)
    try:
        return parse_json(storage.get(url))
    except MissingObjectError:
        return None
    except DocumentError as error:
        raise DataError(
            f"{url} is not valid JSON ({error}); delete it, and the unfinished job resumes from its parts"
        ) from error


def _refuse_target(plan: ShardPlan, claim: dict[str, Any]) -> NoReturn:
    """Raise DataError for a folder with the claim of another plan, naming the differences."""
    own_claim = _claim(plan)
    names = {"num_samples": "samples", "source": "settings or annotation files of the source", "seed": "seed"}
    names["num_shards"] = "number of shards"
    differing = [
        name if field == "source" else f"{name}: {claim[field]} there, {own_claim[field]} here"
        for field, name in names.items()
        if claim.get(field) is not None and claim[field] != own_claim[field]
    ]
    raise DataError(
        f"{plan.target} belongs to another shard plan (different: {'; '.join(differing) or 'samples or version'}); "
        "choose another folder, or write it again with `m2f shard --redo` (write_dataset: redo=True)"
    )
