"""Job that writes the missing shards of one data set and then its manifest.

Writing a shard again produces the same bytes. An interrupted job can therefore be started again; it skips shards that
have a receipt. Small jobs run in this process, because Ray takes longer to start.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial

from m2f.cluster.environment import uses_ray
from m2f.cluster.recipe.config import ClusterConfig
from m2f.cluster.sharding.report import MAX_SHOWN_PROBLEMS, REPORT_FILE, ShardFailure, ShardJobError, ShardReport
from m2f.cluster.terminal import Progress, print_err
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.documents import DocumentError, parse_json
from m2f.data_pipeline.errors import DataError, format_list
from m2f.data_pipeline.readers import Reader, dataset_fingerprint, open_dataset
from m2f.data_pipeline.readers.unusable import UnusableAnnotation, require_all_usable
from m2f.data_pipeline.shards.plan import ShardPlan, committed_document, keep_written_plan, plan_shards
from m2f.data_pipeline.shards.publish import find_lost
from m2f.data_pipeline.shards.sources import SourceChanges, compare_sources
from m2f.data_pipeline.shards.write import (
    SampleProblem,
    ShardPart,
    commit_manifest,
    count_problems,
    prepare_parts,
    withdraw_outdated,
    write_shard,
)
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.errors import UserError
from m2f.model.format_count import format_count

MAX_LOCAL_IMAGES, MAX_LOCAL_BYTES = 300, 50_000_000
"""Numbers of images and bytes that this process writes in about the time that Ray takes to start."""
_TOO_LARGE = re.compile(r"(\d+) x (\d+) pixels exceed max_pixels")
"""Part of the message about an image that was left out for its size."""
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

    Shards are written again if they are missing or truncated, if their source files have changed, or if `max_pixels`
    now permits images that were left out. Unusable annotations that are found when the source is opened end the job at
    once, unless `skip_bad` is set. Unusable samples that are found later do not end it early. After the last shard, the
    report is stored beside the shards, even if the data set cannot be committed.

    Args:
        name: name of the data set.
        dataset: its settings, with a source.
        cluster: settings of the Ray cluster.
        storage: storage of the shards.
        skip_bad: whether to leave out samples that cannot be used. Otherwise they prevent the manifest from being
            written, unless the complete data set that is written again already left them out.
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
    plan, new_plan = _make_plans(reader, dataset, storage, redo=redo)
    existing = None if redo else committed_document(plan, storage)
    changes = SourceChanges() if redo else _compare_sources(name, reader, plan, storage)
    stored: ShardReport | None = None
    notes: tuple[str, ...] = ()
    if existing is not None:
        stored = _stored_report(name, plan, existing["shards"], storage)
        permitted = _permitted_shards(plan, stored.problems, dataset.max_pixels)
        lost = find_lost(plan.target, existing, storage)
        changes = replace(changes, shards=changes.shards | permitted)
        if not changes.shards and not lost:
            notes = _source_notes(changes, bool(reader.files(0))) + _count_notes(plan, new_plan, changes)
            return replace(stored, notes=notes)
        notes = _repair_notes(permitted, lost)
    if not skip_bad and (existing is None or changes.shards):
        require_all_usable(unusable)
    parts = prepare_parts(reader, plan, changes, storage, skip_bad=skip_bad, redo=redo)
    missing = [index for index in range(len(plan.shard_keys)) if index not in parts]
    failures = []
    if missing:
        with ExitStack() as stack:
            write = _choose_writer(reader, plan, missing, storage, cluster, keep_going, ray_stack or stack)
            failures = _write_missing(name, plan, parts, missing, write)
    is_restored = not failures and withdraw_outdated(plan, existing, parts.values(), storage) and not changes.shards
    problems = _list_problems(unusable, parts)
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
        notes=_source_notes(changes, has_files=False) + notes,
        failures=tuple(failures),
        committed=not failures and (skip_bad or is_restored or not _new_problems(problems, stored)),
    )
    return _commit_and_report(plan, parts.values(), report, storage)


def _make_plans(reader: Reader, dataset: DatasetConfig, storage: Storage, *, redo: bool) -> tuple[ShardPlan, ShardPlan]:
    """Return the plan by which shards are written, and the plan that a new data set would have."""
    new_plan = plan_shards(reader, dataset, dataset_fingerprint(dataset))
    if redo:
        return new_plan, new_plan
    return keep_written_plan(new_plan, storage, partial(dataset_fingerprint, dataset, earlier=True)), new_plan


def _commit_and_report(
    plan: ShardPlan, parts: Iterable[ShardPart], report: ShardReport, storage: Storage
) -> ShardReport:
    """Write the manifest if `report.committed` is set, store the report in any case, and return it.

    Raises DataError or ShardJobError if the data set is not committed.
    """
    commit_error = None
    if report.committed:
        try:
            commit_manifest(plan, parts, storage, skip_bad=True)  # `committed` implies accepted problems
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


def _list_problems(unusable: Iterable[UnusableAnnotation], parts: dict[int, ShardPart]) -> tuple[SampleProblem, ...]:
    """Return the problems of the annotation file, and then those of the shards in order."""
    problems = [SampleProblem("", entry.source, entry.message, is_in_shard=True) for entry in unusable]
    return (*problems, *(problem for index in sorted(parts) for problem in parts[index].problems))


def _new_problems(problems: Iterable[SampleProblem], stored: ShardReport | None) -> list[SampleProblem]:
    """Return the problems that are not in `stored`, the report of the complete data set; all if it is None.

    A left-out sample is known if the data set also leaves it out. A left-out annotation is known if the data set has
    any problem with its sample.
    """
    known_keys = set[tuple[str, bool]]()
    for problem in () if stored is None else stored.problems:
        known_keys |= {(problem.key, True), (problem.key, problem.is_in_shard)}
    return [problem for problem in problems if (problem.key, problem.is_in_shard) not in known_keys]


def _permitted_shards(plan: ShardPlan, problems: Iterable[SampleProblem], max_pixels: int) -> frozenset[int]:
    """Return the shards with images that were left out for their size and that `max_pixels` now permits."""
    sizes = ((problem.key, _TOO_LARGE.search(problem.message)) for problem in problems)
    keys = {key for key, size in sizes if size is not None and int(size[1]) * int(size[2]) <= max_pixels}
    return frozenset(index for index, shard in enumerate(plan.shard_keys) if not keys.isdisjoint(shard))


def _repair_notes(permitted: Collection[int], lost: Collection[str]) -> tuple[str, ...]:
    """Return messages about shards with images that max_pixels now permits, and about lost files."""
    notes = []
    if permitted:
        shards = format_count(len(permitted), "shard")
        notes.append(f"max_pixels now permits images that were left out; rewritten: {shards}")
    if lost:
        notes.append(f"missing or damaged: {format_count(len(lost), 'file')} ({format_list(lost, 3)}); written again")
    return tuple(notes)


def _count_notes(plan: ShardPlan, new_plan: ShardPlan, changes: SourceChanges) -> tuple[str, ...]:
    """Return a message if a new data set would have another number of shards, unless missing files explain it."""
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


def _stored_report(name: str, plan: ShardPlan, shards: Sequence[dict[str, int]], storage: Storage) -> ShardReport:
    """Return the report of a data set that is already committed."""
    url = join(plan.target, REPORT_FILE)
    try:
        stored = parse_json(storage.get(url)) if storage.exists(url) else {"problems": []}
        problems = tuple(SampleProblem(**problem) for problem in stored["problems"])
        repairs = tuple((repair, count) for repair, count in stored.get("repairs", ()))
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
        committed=True,
    )
