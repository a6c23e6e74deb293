"""Job that writes the missing shards of one data set and then its manifest.

Writing a shard again produces the same bytes. An interrupted job can therefore be started again; it skips shards that
have a receipt. Small jobs run in this process, because Ray takes longer to start.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

from m2f.cluster.environment import uses_ray
from m2f.cluster.recipe.config import ClusterConfig
from m2f.cluster.sharding.report import MAX_SHOWN_PROBLEMS, REPORT_FILE, ShardFailure, ShardJobError, ShardReport
from m2f.cluster.terminal import Progress, print_err
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.documents import DocumentError, parse_json
from m2f.data_pipeline.errors import DataError, format_list
from m2f.data_pipeline.readers import Reader, dataset_fingerprint, open_dataset
from m2f.data_pipeline.readers.unusable import require_all_usable
from m2f.data_pipeline.shards.plan import (
    ShardPlan,
    clear_target,
    committed_document,
    delete_manifest,
    keep_shard_count,
    plan_shards,
)
from m2f.data_pipeline.shards.sources import SourceChanges, compare_sources, require_source_files
from m2f.data_pipeline.shards.write import (
    SampleProblem,
    ShardPart,
    commit_manifest,
    complete_parts,
    count_problems,
    write_shard,
)
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.errors import UserError
from m2f.model.format_count import format_count

MAX_LOCAL_IMAGES = 300
MAX_LOCAL_BYTES = 50_000_000
"""Numbers of images and bytes that this process writes in about the time that Ray takes to start."""
WriteShards = Callable[[Sequence[int]], Iterator[ShardPart | ShardFailure]]
"""Function that writes the shards with the given indices and yields a part or failure for each, as they finish."""


def run_shard_job(
    name: str,
    dataset: DatasetConfig,
    cluster: ClusterConfig,
    storage: Storage,
    *,
    skip_bad: bool = False,
    keep_going: bool = False,
    redo: bool = False,
    ray_stack: ExitStack | None = None,
) -> ShardReport:
    """Write the missing shards of one data set, then its manifest.

    Shards are written again if their source files have changed. Unusable annotations that are found when the source is
    opened end the job at once, unless `skip_bad` is set. Unusable samples that are found later do not end it early.
    After the last shard, the report is stored beside the shards, even if the data set cannot be committed.

    Args:
        name: name of the data set.
        dataset: its settings, with a source.
        cluster: settings of the Ray cluster.
        storage: storage of the shards.
        skip_bad: whether to leave out samples that cannot be used. Otherwise they prevent the manifest from being
            written.
        keep_going: whether to write all other shards if one cannot be written. Otherwise the job ends at once.
        redo: whether to write all shards again.
        ray_stack: stack that stops Ray when it is closed, if this job starts Ray. Jobs of further data sets can use Ray
            until then. With None, Ray stops at the end of this job.

    Raises:
        DataError: the source is missing or unusable, the target contains a different data set, or samples cannot be
            used.
        ShardJobError: a shard could not be written.
        StorageError, ClusterError: the storage or Ray cannot be reached, or the store denies deletion.
    """
    started = time.monotonic()
    if dataset.source is None:
        raise DataError(f"datasets.{name} has no source to create shards from; set datasets.{name}.source")
    reader, unusable = open_dataset(dataset)
    plan = new_plan = plan_shards(reader, dataset, dataset_fingerprint(dataset))
    if not redo:
        plan = keep_shard_count(plan, storage)
    existing = None if redo else committed_document(plan, storage)
    changes = SourceChanges() if redo else _compare_sources(name, reader, plan, storage)
    if existing is not None and not changes.shards:
        notes = _source_notes(changes, bool(reader.files(0))) + _count_notes(plan, new_plan, changes)
        return _stored_report(name, plan, existing["shards"], notes, storage)
    if not skip_bad:
        require_all_usable(unusable)
    if redo:
        require_source_files(reader, reader.keys, plan.target, skip_bad=skip_bad)
        clear_target(plan.target, storage)
    parts = {part.index: part for part in complete_parts(plan, storage, changes)}
    missing = [index for index in range(len(plan.shard_keys)) if index not in parts]
    if existing is not None:
        keys = (key for index in missing for key in plan.shard_keys[index])
        require_source_files(reader, keys, plan.target, skip_bad=skip_bad)
        delete_manifest(plan, storage)
    failures = []
    if missing:
        with ExitStack() as stack:
            write = _choose_writer(reader, plan, missing, storage, cluster, keep_going, ray_stack or stack)
            failures = _write_missing(name, plan, parts, missing, write)
    problems = tuple(SampleProblem("", entry.source, entry.message, is_in_shard=True) for entry in unusable)
    problems += tuple(problem for index in sorted(parts) for problem in parts[index].problems)
    report = ShardReport(
        dataset=name,
        target=plan.target,
        num_samples=plan.num_samples,
        num_shards=len(plan.shard_keys),
        num_bytes=sum(part.info.size for part in parts.values()),
        written_shards=len(missing) - len(failures),
        elapsed_s=round(time.monotonic() - started, 3),
        problems=problems,
        repairs=_count_repairs(parts.values()),
        notes=_source_notes(changes, has_files=False),
        failures=tuple(failures),
        committed=not failures and (skip_bad or not problems),
    )
    return _commit_and_report(plan, parts.values(), report, storage, skip_bad)


def _commit_and_report(
    plan: ShardPlan, parts: Iterable[ShardPart], report: ShardReport, storage: Storage, skip_bad: bool
) -> ShardReport:
    """Write the manifest if `report.committed` is set, store the report in any case, and return it.

    Raises DataError or ShardJobError if the data set is not committed.
    """
    commit_error = None
    if report.committed:
        try:
            commit_manifest(plan, parts, storage, skip_bad=skip_bad)
        except DataError as error:  # no sample is left, or another data set was committed first; still store the report
            commit_error, report = error, replace(report, committed=False)
    storage.put(join(plan.target, REPORT_FILE), json.dumps(asdict(report), indent=1).encode())
    _require_committed(plan, report, commit_error)
    return report


def _choose_writer(
    reader: Reader,
    plan: ShardPlan,
    missing: Sequence[int],
    storage: Storage,
    cluster: ClusterConfig,
    keep_going: bool,
    ray_stack: ExitStack,
) -> WriteShards:
    """Return a function that writes shards in this process if little is missing, else with Ray, which it starts."""
    if not uses_ray(cluster.address) and _is_small(reader, plan, missing):
        return lambda indices: write_locally(reader, plan, indices, storage, keep_going)
    from m2f.cluster.ray_cluster import existing_or_local_cluster
    from m2f.cluster.sharding.ray_tasks import run_tasks

    ray_stack.enter_context(existing_or_local_cluster(cluster, cluster.shard_tasks))
    return lambda indices: run_tasks(reader, plan, indices, storage, cluster.shard_tasks, keep_going)


def _is_small(reader: Reader, plan: ShardPlan, missing: Sequence[int]) -> bool:
    """Return whether the missing shards have at most MAX_LOCAL_IMAGES images and MAX_LOCAL_BYTES bytes."""
    keys = {key for index in missing for key in plan.shard_keys[index]}
    if len(keys) > MAX_LOCAL_IMAGES:
        return False
    return sum(reader.size_hint(i) for i, key in enumerate(reader.keys) if key in keys) <= MAX_LOCAL_BYTES


def write_locally(
    reader: Reader, plan: ShardPlan, missing: Sequence[int], storage: Storage, keep_going: bool
) -> Iterator[ShardPart | ShardFailure]:
    """Write shards one at a time in this process and yield a part or failure for each."""
    for index in missing:
        try:
            yield write_shard(reader, plan, index, storage)
        except UserError as error:
            if not keep_going:
                raise
            yield ShardFailure(index, str(error))


def _write_missing(
    name: str, plan: ShardPlan, parts: dict[int, ShardPart], missing: Sequence[int], write: WriteShards
) -> list[ShardFailure]:
    """Write the missing shards with a progress line, add them to `parts`, and return the failures."""
    failures: list[ShardFailure] = []
    done = sum(len(plan.shard_keys[index]) for index in parts)
    with Progress(f"sharding {name}", plan.num_samples, "images", done) as progress:
        for part in write(missing):
            if isinstance(part, ShardFailure):
                failures.append(part)
                progress.note(part.message)
                continue
            parts[part.index] = part
            progress.advance(len(plan.shard_keys[part.index]), part.info.size)
            for problem in part.problems:
                progress.note(problem.line)
    return failures


def _compare_sources(name: str, reader: Reader, plan: ShardPlan, storage: Storage) -> SourceChanges:
    """Return the changes of source files. Print a line if contents must be compared, because that takes a while."""

    def announce() -> None:
        print_err(f"{name}: modification times of source files differ from the recorded ones; comparing their contents")

    return compare_sources(reader, plan.target, len(plan.shard_keys), storage, announce)


def _source_notes(changes: SourceChanges, has_files: bool) -> tuple[str, ...]:
    """Return messages about changed source files.

    `has_files` states whether the source has files, which a committed data set should have recorded.
    """
    notes = []
    if changes.changed:
        notes.append(
            f"changed: {format_count(len(changes.changed), 'source file')} ({format_list(changes.changed, 3)}); "
            f"rewritten: {format_count(len(changes.shards), 'shard')}"
        )
    if changes.num_missing:
        notes.append(f"missing: {format_count(changes.num_missing, 'source file')}; the existing shards are kept")
    if has_files and not changes.digests:
        notes.append(
            "these shards were written before m2f tracked source files, so changed files are not detected; --redo "
            "rewrites the data set"
        )
    return tuple(notes)


def _count_notes(plan: ShardPlan, new_plan: ShardPlan, changes: SourceChanges) -> tuple[str, ...]:
    """Return a message if a new data set would have another number of shards. Missing files explain the difference."""
    count, new_count = len(plan.shard_keys), len(new_plan.shard_keys)
    if count == new_count or changes.num_missing:
        return ()
    return (
        f"kept: {format_count(count, 'shard')}; with the present files and shard_mb, a new data set would have "
        f"{new_count:,}; --redo rewrites it",
    )


def _require_committed(plan: ShardPlan, report: ShardReport, commit_error: DataError | None) -> None:
    """Raise an error if the data set is not committed: manifest refused, shards failed or samples unusable."""
    failures, problems = report.failures, report.problems
    if commit_error is not None:
        raise DataError(f"{report.summary()}\n{commit_error}") from commit_error
    if failures:
        listed = "\n".join(f"  {failure.message}" for failure in failures[:MAX_SHOWN_PROBLEMS])
        raise ShardJobError(
            f"{report.summary()}\n{len(failures)} of {len(plan.shard_keys)} shards could not be written:\n{listed}\n"
            f"All are listed in {join(plan.target, REPORT_FILE)}; run again to write the rest"
        )
    if not report.committed:
        raise DataError(
            f"{report.summary()}\n{count_problems(problems, plan.num_samples)} cannot be used, so the data "
            f"set is not committed. All are listed in {join(plan.target, REPORT_FILE)}. Correct them and run again, or "
            "leave them out with --skip-bad"
        )


def _count_repairs(parts: Iterable[ShardPart]) -> tuple[tuple[str, int], ...]:
    counts = Counter[str]()
    for part in parts:
        counts.update(dict(part.repairs))
    return tuple(sorted(counts.items()))


def _stored_report(
    name: str, plan: ShardPlan, shards: Sequence[dict[str, int]], notes: tuple[str, ...], storage: Storage
) -> ShardReport:
    """Return the report of a data set that is already committed."""
    url = join(plan.target, REPORT_FILE)
    try:
        stored = parse_json(storage.get(url)) if storage.exists(url) else {"problems": []}
        problems = tuple(SampleProblem(**problem) for problem in stored["problems"])
        repairs = tuple((what, count) for what, count in stored.get("repairs", ()))
    except (DocumentError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ShardJobError(
            f"{url} cannot be read ({type(error).__name__}: {error}); delete it, the shards do not need it"
        ) from error
    return ShardReport(
        dataset=name,
        target=plan.target,
        num_samples=plan.num_samples,
        num_shards=len(plan.shard_keys),
        num_bytes=sum(shard["size"] for shard in shards),
        written_shards=0,
        elapsed_s=0.0,
        problems=problems,
        repairs=repairs,
        notes=notes,
        committed=True,
    )
