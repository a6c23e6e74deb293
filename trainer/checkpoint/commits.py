"""A run's list of commits, and its metrics per commit. The supervisor and the evaluation service read them.

<run folder>/commits/00000042-3-0123456789abcdef             step, lease and digest of the manifest; an empty object
<run folder>/commits/00000042-3-0123456789abcdef.withdrawn   the commit is damaged, or a rollback discarded it
<run folder>/metrics/00000042-3.json                         metrics by step since the previous commit

Rank 0 writes metrics before the manifest of the checkpoint, and the entry in `commits/` after it. Does not import
torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from m2f.data_pipeline.errors import MissingObjectError
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.checkpoint.folder import (
    EVALUATION_PIN,
    MANIFEST,
    checkpoint_url,
    list_checkpoints,
    parse_folder,
    parse_metrics,
    pin,
    read_legacy_metrics,
    unpin,
)
from m2f.trainer.checkpoint.lease_record import newest_number, read_record
from m2f.trainer.checkpoint.leftovers import abort_outdated_writes
from m2f.trainer.reporting import CommittedCheckpoint

LOGGER = logging.getLogger(__name__)
_COMMIT = re.compile(r"/commits/((\d{8,})-(\d+)-[0-9a-f]{16})(\.withdrawn)?$")
_METRICS = re.compile(r"/metrics/(\d{8,})-(\d+)\.json$")


@dataclass(frozen=True)
class Commit:
    """One commit of a checkpoint. If a step is committed again after a rollback, that is another commit."""

    name: str
    """Step, lease and digest of the manifest."""
    checkpoint: CommittedCheckpoint


def record_commit(storage: Storage, checkpoint: CommittedCheckpoint, manifest: bytes) -> None:
    """Add a checkpoint with a stored manifest to the list of commits. Repeating the call changes nothing.

    A repeated step after a damaged checkpoint may produce the same bytes. The commit is then valid again.
    """
    url = _commit_url(checkpoint.url, manifest)
    storage.put(url, b"")
    storage.delete(f"{url}.withdrawn")


def commit_name(storage: Storage, url: str) -> str | None:
    """Return the name of the commit of the checkpoint folder `url`; None if it has no manifest."""
    try:
        return _commit_url(url, storage.get(join(url, MANIFEST))).rpartition("/")[2]
    except MissingObjectError:
        return None


def withdraw_commit(storage: Storage, url: str) -> None:
    """Withdraw the commit of the checkpoint folder `url` before its manifest is deleted, if it has a manifest."""
    try:
        manifest = storage.get(join(url, MANIFEST))
    except MissingObjectError:
        return
    storage.put(_commit_url(url, manifest) + ".withdrawn", b"")


@dataclass(frozen=True)
class CommitList:
    """Content of `commits/` at one moment."""

    commits: tuple[Commit, ...]
    """Valid commits, by step: neither withdrawn nor made by a process that had lost the run folder."""
    withdrawn: frozenset[str] = frozenset()
    """Names of withdrawn commits."""


def list_commits(storage: Storage, run_folder: str) -> tuple[Commit, ...]:
    """Return the valid commits, by step."""
    return read_commits(storage, run_folder).commits


def read_commits(storage: Storage, run_folder: str, with_deleted: bool = False) -> CommitList:
    """Read all commits of a run. Those of earlier leases are valid if the newest lease found their checkpoints.

    `with_deleted` adds commits of earlier leases that the run kept, but whose checkpoints were deleted later.
    """
    found, withdrawn = _list_names(storage, run_folder)
    newest = newest_number(storage, run_folder) if found else 0
    known = frozenset(read_record(storage, run_folder, newest).found) if newest else frozenset[str]()
    limits = _last_steps(storage, run_folder, (lease for _, _, lease in found), newest) if with_deleted else {}
    commits = []
    for name, step, lease in sorted(found, key=lambda commit: commit[1:]):
        checkpoint = CommittedCheckpoint(step, checkpoint_url(run_folder, step, lease))
        is_valid = lease >= newest or checkpoint.name in known or step <= limits.get(lease, 0)
        if is_valid and name not in withdrawn:
            commits.append(Commit(name, checkpoint))
    return CommitList(tuple(commits), frozenset(withdrawn))


def repair_commits(storage: Storage, run_folder: str, evaluates: bool) -> None:
    """Make `commits/` agree with the checkpoints. The holder of the lease calls this while no rank runs.

    A committed checkpoint without an entry in `commits/`, because its rank died, gets one, and a pin if the run
    `evaluates`. Metrics that a checkpoint of version 0.1 contains are stored, too. If the run does not evaluate, all
    pins for evaluations are removed. Unfinished writes are aborted.

    Commits after the newest checkpoint are withdrawn: their checkpoints were deleted by a user, to roll the run back.
    """
    abort_outdated_writes(storage, run_folder)
    commits, withdrawn = _list_names(storage, run_folder)
    listed = {name for name, _, _ in commits}
    checkpoints = list_checkpoints(storage, run_folder)  # after the commits, so every commit has its checkpoint
    newest = max((checkpoint.step for checkpoint in checkpoints), default=0)
    for name, step, _ in commits:
        if step > newest and name not in withdrawn:
            storage.put(join(run_folder, "commits", f"{name}.withdrawn"), b"")
    for checkpoint in checkpoints:
        if not evaluates:
            unpin(storage, checkpoint.url, EVALUATION_PIN)
        manifest = storage.get(join(checkpoint.url, MANIFEST))
        if _commit_url(checkpoint.url, manifest).rpartition("/")[2] in listed:
            continue
        if evaluates:
            pin(storage, checkpoint.url, EVALUATION_PIN)
        points = read_legacy_metrics(storage, checkpoint.url)
        if points:
            _, lease = parse_folder(checkpoint.url)
            write_metrics(storage, run_folder, checkpoint.step, lease, points)
        record_commit(storage, checkpoint, manifest)


def write_metrics(
    storage: Storage, run_folder: str, step: int, lease: int, points: Mapping[int, Mapping[str, float]]
) -> None:
    """Store the metrics, by step, that the commit of `step` covers."""
    url = join(run_folder, "metrics", f"{step:08d}-{lease}.json")
    storage.put(url, json.dumps(points).encode())


def read_metrics(
    storage: Storage, run_folder: str, known: Collection[str] = ()
) -> Iterator[tuple[str, dict[int, dict[str, float]]]]:
    """Yield URL and content of every metrics file that is not in `known`, ordered by the step of its commit.

    Files of steps after the one from which a later lease continued are left out. They are from a process that had lost
    the run folder, or a user deleted the newest checkpoints to roll back. Damaged files yield no metrics and log a
    warning, because training does not need them.
    """
    found = [(match, url) for url in storage.list(join(run_folder, "metrics")) if (match := _METRICS.search(url))]
    files = sorted((int(match[1]), int(match[2]), url) for match, url in found if url not in known)
    newest = newest_number(storage, run_folder) if files else 0
    limits = _last_steps(storage, run_folder, (lease for _, lease, _ in files), newest)
    for step, lease, url in files:
        if step <= limits.get(lease, step):
            data = storage.get(url)
            try:
                points = parse_metrics(data)
            except ValueError as error:
                LOGGER.warning(
                    f"{url} cannot be read ({error}); metrics of its steps that MLflow does not have yet are lost"
                )
                points = {}
            yield url, points


def _list_names(storage: Storage, run_folder: str) -> tuple[set[tuple[str, int, int]], set[str]]:
    """Return name, step and lease of every commit ever listed, and the names of the withdrawn ones."""
    found, withdrawn = set[tuple[str, int, int]](), set[str]()
    for url in storage.list(join(run_folder, "commits")):
        if match := _COMMIT.search(url):
            found.add((match[1], int(match[2]), int(match[3])))
            withdrawn |= {match[1]} if match[4] else set()
    return found, withdrawn


def _last_steps(storage: Storage, run_folder: str, leases: Iterable[int], newest: int) -> dict[int, int]:
    """Return, for each of the `leases` before the newest, the last of its steps that the run kept.

    This is the smallest step from which a later lease continued, because a user may roll back past several leases.
    """
    kept: dict[int, int] = {}
    for lease in range(newest, min(leases, default=newest), -1):
        found = read_record(storage, run_folder, lease).found
        step = max((parse_folder(name)[0] for name in found), default=0)
        kept[lease - 1] = min(step, kept.get(lease, step))
    return kept


def _commit_url(url: str, manifest: bytes) -> str:
    step, lease = parse_folder(url)
    run_folder = url.rpartition("/checkpoints/")[0]
    return join(run_folder, "commits", f"{step:08d}-{lease}-{hashlib.sha256(manifest).hexdigest()[:16]}")
