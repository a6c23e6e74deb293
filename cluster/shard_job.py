"""Sharding on Ray: one task per shard, a bounded number at once, the manifest last.

Tasks can be repeated and give the same bytes, so a job that was interrupted in any way is simply started again: shards
with a receipt are skipped. A finished job is recognised before Ray is started.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import ray
from ray.exceptions import RayError, RayTaskError

from m2f.cluster.ray_cluster import local_or_existing
from m2f.cluster.recipe.config import ClusterConfig
from m2f.cluster.terminal import Progress, first_lines, format_duration, print_err
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.documents import DocumentError, parse_json
from m2f.data_pipeline.errors import DataError, some
from m2f.data_pipeline.readers import Reader, dataset_fingerprint, open_dataset
from m2f.data_pipeline.readers.unusable import require_none
from m2f.data_pipeline.shards.plan import ShardPlan, clear_target, committed_document, plan_shards, withdraw
from m2f.data_pipeline.shards.sources import SourceChanges, compare_sources
from m2f.data_pipeline.shards.write import (
    SampleProblem,
    ShardPart,
    commit_manifest,
    complete_parts,
    count_problems,
    write_shard,
)
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.counted import counted
from m2f.model.errors import UserError

LOGGER = logging.getLogger(__name__)
TASK_RETRIES = 3
REPORT_FILE = "report.json"
SHOWN_PROBLEMS = 10


class ShardJobError(UserError):
    """A shard that cannot be written. Names the shard, the cause and the remedy."""


@dataclass(frozen=True, slots=True)
class ShardFailure:
    """A shard that could not be written, and why."""

    index: int
    message: str


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What a sharding job found and did; stored as report.json beside the shards."""

    dataset: str
    target: str
    """Folder or `s3://` prefix of the data set."""
    num_samples: int
    """Samples that the source has."""
    num_shards: int
    num_bytes: int
    """Of all shards."""
    written_shards: int
    """By this run; the others were there already."""
    elapsed_s: float
    problems: tuple[SampleProblem, ...]
    """Samples, and annotations of other samples, that cannot be used."""
    repairs: tuple[tuple[str, int], ...] = ()
    """What was mended in the samples, and how often."""
    notes: tuple[str, ...] = ()
    """What became of the source files since shards were made of them."""
    failures: tuple[ShardFailure, ...] = ()
    """Shards that could not be written, where the job was told to go on."""
    committed: bool
    """Whether the manifest is written: the data set exists."""

    def summary(self) -> str:
        """As text: what is written, and why the rest is not."""
        kept = self.num_samples - sum(not problem.is_in_shard for problem in self.problems)
        lines = [
            f"{self.dataset}: {counted(kept, 'sample')} in {counted(self.num_shards, 'shard')}, "
            f"{self.num_bytes / 1e6:.1f} MB"
        ]
        if not self.written_shards:
            lines[0] += ", all there already"
        else:
            lines[0] += f"; wrote {counted(self.written_shards, 'shard')} in {format_duration(self.elapsed_s)}"
        lines += [f"  {note}" for note in self.notes]
        problems = [problem.line for problem in self.problems]
        lines += first_lines(problems, SHOWN_PROBLEMS, f" in {join(self.target, REPORT_FILE)}")
        lines += [f"  {count:,} {what}" for what, count in self.repairs]
        return "\n".join(lines)


def run_shard_job(
    name: str,
    dataset: DatasetConfig,
    cluster: ClusterConfig,
    storage: Storage,
    *,
    skip_bad: bool = False,
    keep_going: bool = False,
    redo: bool = False,
) -> ShardReport:
    """Write what is missing of one data set, then its manifest. The report is stored in any case.

    Shards of source files that have changed since are written again, with `redo` all. Samples that cannot be used never
    end the job early. With `keep_going` neither do shards that cannot be written: all others are written first.

    Raises:
        DataError: no source, a source that cannot be used, a target that holds another data set, or samples that
            cannot be used (unless `skip_bad` leaves them out): then no manifest is written.
        ShardJobError: tasks failed for good.
        StorageError, ClusterError: the store or Ray cannot be reached.
    """
    started = time.monotonic()
    if dataset.source is None:
        raise DataError(f"datasets.{name} has no source to make shards from; set datasets.{name}.source")
    reader, unusable = open_dataset(dataset)
    plan = plan_shards(reader, dataset, dataset_fingerprint(dataset))
    existing = None if redo else committed_document(plan, storage)
    changes = SourceChanges() if redo else _compare_sources(name, reader, plan, storage)
    if existing is not None and not changes.shards:
        notes = _source_notes(changes, bool(reader.files(0)))
        return _stored_report(name, plan, existing["shards"], notes, storage)
    if not skip_bad:
        require_none(unusable)
    if redo:
        clear_target(plan.target, storage)
    elif existing is not None:
        withdraw(plan, storage)
    parts = {part.index: part for part in complete_parts(plan, storage, changes)}
    num_missing = len(plan.shard_keys) - len(parts)
    failures = _write_missing(name, reader, plan, parts, storage, cluster, keep_going) if num_missing else []
    problems = tuple(SampleProblem("", entry.source, entry.message, is_in_shard=True) for entry in unusable)
    problems += tuple(problem for index in sorted(parts) for problem in parts[index].problems)
    report = ShardReport(
        dataset=name,
        target=plan.target,
        num_samples=plan.num_samples,
        num_shards=len(plan.shard_keys),
        num_bytes=sum(part.info.size for part in parts.values()),
        written_shards=num_missing - len(failures),
        elapsed_s=round(time.monotonic() - started, 3),
        problems=problems,
        repairs=_count_repairs(parts.values()),
        notes=_source_notes(changes, has_files=False),
        failures=tuple(failures),
        committed=not failures and (skip_bad or not problems),
    )
    refusal = None
    if report.committed:
        try:
            commit_manifest(plan, parts.values(), storage, skip_bad=skip_bad)
        except DataError as error:  # nothing is left, or another data set came first: the report says why all the same
            refusal, report = error, replace(report, committed=False)
    storage.put(join(plan.target, REPORT_FILE), json.dumps(asdict(report), indent=1).encode())
    _require_committed(plan, report, refusal)
    return report


def _write_missing(
    name: str,
    reader: Reader,
    plan: ShardPlan,
    parts: dict[int, ShardPart],
    storage: Storage,
    cluster: ClusterConfig,
    keep_going: bool,
) -> list[ShardFailure]:
    """Write the shards that `parts` lacks and add them to it, with progress; returns those that failed."""
    failures: list[ShardFailure] = []
    missing = [index for index in range(len(plan.shard_keys)) if index not in parts]
    done = sum(len(plan.shard_keys[index]) for index in parts)
    with (
        local_or_existing(cluster, cluster.shard_tasks),
        Progress(f"sharding {name}", plan.num_samples, "images", done) as progress,
    ):
        for part in _run_tasks(reader, plan, missing, storage, cluster.shard_tasks, keep_going):
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
    """The changes, announced in a line where contents have to be compared, which takes a while."""

    def announce() -> None:
        print_err(f"{name}: times of source files differ from those of the shards; comparing their contents")

    return compare_sources(reader, plan.target, len(plan.shard_keys), storage, announce)


def _source_notes(changes: SourceChanges, has_files: bool) -> tuple[str, ...]:
    """Lines of a report about changed source files; `has_files` where a committed source should have known ones."""
    notes = []
    if changes.changed:
        notes.append(
            f"{len(changes.changed):,} source files have changed; the {len(changes.shards):,} shards made of them are "
            f"written again: {some(changes.changed, 3)}"
        )
    if changes.num_missing:
        notes.append(f"{changes.num_missing:,} source files are no longer there; the shards made of them stay")
    if has_files and not changes.digests:
        notes.append(
            "these shards are from before m2f kept track of source files: changed files are not noticed; --redo writes "
            "the data set again"
        )
    return tuple(notes)


def _require_committed(plan: ShardPlan, report: ShardReport, refusal: DataError | None) -> None:
    """Raise what keeps the data set from being committed: the manifest's refusal, failed tasks or unusable samples."""
    failures, problems = report.failures, report.problems
    if refusal is not None:
        raise DataError(f"{report.summary()}\n{refusal}") from refusal
    if failures:
        listed = "\n".join(f"  {failure.message}" for failure in failures[:SHOWN_PROBLEMS])
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


def _run_tasks(
    reader: Reader, plan: ShardPlan, missing: Sequence[int], storage: Storage, max_running: int, keep_going: bool
) -> Iterator[ShardPart | ShardFailure]:
    """Parts in the order in which their tasks end, with at most `max_running` at once."""
    position = {key: index for index, key in enumerate(reader.keys)}
    plan_ref = ray.put(plan)
    waiting = list(reversed(missing))
    running: dict[ray.ObjectRef, int] = {}
    while waiting or running:
        while waiting and len(running) < max_running:
            index = waiting.pop()
            samples = reader.subset([position[key] for key in plan.shard_keys[index]])  # small arguments of tasks
            running[_write_shard_task.remote(samples, plan_ref, index, storage)] = index
        done, _ = ray.wait(list(running), num_returns=1)
        index = running.pop(done[0])
        try:
            part: ShardPart | ShardFailure = _task_result(done[0], index, plan)
        except UserError as error:
            if not keep_going:
                raise
            part = ShardFailure(index, str(error))
        yield part


@ray.remote(num_cpus=1, max_retries=TASK_RETRIES, scheduling_strategy="SPREAD")
def _write_shard_task(samples: Reader, plan: ShardPlan, index: int, storage: Storage) -> ShardPart:
    return write_shard(samples, plan, index, storage)


def _task_result(ref: ray.ObjectRef, index: int, plan: ShardPlan) -> ShardPart:
    """The part, or the task's failure as one message."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except RayError as error:
        text = str(error).strip()
        reason = text.splitlines()[0] if text else type(error).__name__
        raise ShardJobError(
            f"{plan.target}: shard {index:05d} failed {TASK_RETRIES + 1} times: {type(error).__name__}: {reason}. "
            "If workers run out of memory, lower cluster.shard_tasks or datasets.<name>.shard_mb. The shards that are "
            "written stay; run again to write the rest"
        ) from error


def _stored_report(
    name: str, plan: ShardPlan, shards: Sequence[dict[str, int]], notes: tuple[str, ...], storage: Storage
) -> ShardReport:
    """The report of a data set that is committed already."""
    url = join(plan.target, REPORT_FILE)
    try:
        stored = parse_json(storage.get(url)) if storage.exists(url) else {"problems": []}
    except DocumentError as error:
        raise ShardJobError(f"{url} is not valid JSON ({error}); delete it, the shards need it not") from error
    return ShardReport(
        dataset=name,
        target=plan.target,
        num_samples=plan.num_samples,
        num_shards=len(plan.shard_keys),
        num_bytes=sum(shard["size"] for shard in shards),
        written_shards=0,
        elapsed_s=0.0,
        problems=tuple(SampleProblem(**problem) for problem in stored["problems"]),
        repairs=tuple((what, count) for what, count in stored.get("repairs", ())),
        notes=notes,
        committed=True,
    )
