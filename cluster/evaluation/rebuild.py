"""Prepare the queue of evaluations for a start: rebuild a damaged one from commits and results, and pin checkpoints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from m2f.cluster.evaluation.queue import (
    WITHDRAWN,
    Entry,
    EvaluationQueue,
    queue_url,
    read_entries,
    read_results,
)
from m2f.cluster.recipe.config import RunConfig
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.eval.errors import EvaluationError
from m2f.trainer.checkpoint.commits import Commit, read_commits
from m2f.trainer.checkpoint.folder import EVALUATION_PIN, MANIFEST, checkpoint_url, list_checkpoints, pin
from m2f.trainer.checkpoint.weights import manifest_sha256, weights_url
from m2f.trainer.errors import CheckpointError

DELETED = "the queue was damaged, and this deleted checkpoint had no results"
SUPERSEDED = "a newer checkpoint was evaluated"


def restore_queue(config: RunConfig, storage: Storage) -> str | None:
    """Prepare the queue for a new driver, and pin all checkpoints that wait.

    If the file of the queue is damaged, it is rebuilt, and the damaged file is kept beside it.

    Returns a message for the user, or None if the queue is intact. The holder of the lease must call this before
    anything else reads the queue.
    """
    message = _rebuild_damaged(config, storage)
    queue = EvaluationQueue(storage, queue_url(config))
    queue.reset_starts()
    queue.update(read_commits(storage, config.run_folder))
    existing = {checkpoint.url for checkpoint in list_checkpoints(storage, config.run_folder)}
    for entry in queue.entries():
        if not entry.settled and entry.checkpoint in existing:  # a start without evaluation.sets has removed the pin
            pin(storage, entry.checkpoint, EVALUATION_PIN)
    return message


def _rebuild_damaged(config: RunConfig, storage: Storage) -> str | None:
    url = queue_url(config)
    try:
        read_entries(storage, url)
        return None
    except EvaluationError as error:
        reason = error.__cause__
    storage.put(f"{url}.damaged", storage.get(url))
    entries = rebuilt_entries(config, storage)
    storage.put(url, json.dumps([asdict(entry) for entry in entries], indent=1).encode())
    counts = Counter(entry.status for entry in entries)
    return (
        f"{url} was damaged ({reason}) and has been rebuilt from commits and results: {counts['published']} published, "
        f"{counts['waiting']} to evaluate; the damaged file is kept as {url}.damaged"
    )


def rebuilt_entries(config: RunConfig, storage: Storage) -> tuple[Entry, ...]:
    """Return an entry for every commit in ascending order of steps, and entries of withdrawn commits with results.

    A commit counts as published if the results of all sets name its weights. If the weights of the checkpoint or of
    the results are unknown, for example because the checkpoint is deleted, it counts as published if its step was
    committed only once. All other commits wait again if their checkpoint still exists. With the policy `latest`, they
    wait only if they are newer than every published one.
    """
    found = read_commits(storage, config.run_folder, with_deleted=True)
    names = [*(commit.name for commit in found.commits), *found.withdrawn]
    commit_counts = Counter(int(name.partition("-")[0]) for name in names)
    results = {step: _results_of(config, storage, step) for step in commit_counts}
    entries = [
        _entry(commit, storage, results[commit.checkpoint.step], commit_counts[commit.checkpoint.step] == 1)
        for commit in found.commits
    ]
    if config.evaluation.policy == "latest":
        newest = max((entry.step for entry in entries if entry.status == "published"), default=0)
        entries = [
            e if e.settled or e.step > newest else replace(e, status="dropped", detail=SUPERSEDED) for e in entries
        ]
    for name in found.withdrawn:
        step, lease, _ = name.split("-")
        url = checkpoint_url(config.run_folder, int(step), int(lease))
        if (published := results[int(step)]) is not None:  # so a later evaluation of the step replaces these points
            entries.append(Entry(int(step), url, 0, "withdrawn", WITHDRAWN, published.metrics, name))
    return tuple(sorted(entries, key=lambda entry: (entry.step, entry.status != "withdrawn")))


@dataclass(frozen=True)
class _Results:
    """Contents of the published files of a step."""

    weights: str | None
    """SHA-256 of the weights; None in files of earlier versions."""
    metrics: Mapping[str, float]
    """Metrics of all sets, by name such as `val/PQ`."""


def _results_of(config: RunConfig, storage: Storage, step: int) -> _Results | None:
    """Read the results of a step; None if a set has no intact results, or if the sets name different weights."""
    weights, metrics = set[str | None](), dict[str, float]()
    for evaluation_set in config.evaluation.sets:
        content = read_results(config, storage, step, evaluation_set.label)
        try:
            weights.add((content.get("settings") or {}).get("weights"))
            defined = ((name, value) for name, value in content["metrics"].items() if value is not None)
            metrics |= {f"{evaluation_set.label}/{name}": float(value) for name, value in defined}
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
    return _Results(weights.pop(), metrics) if len(weights) == 1 else None


def _entry(commit: Commit, storage: Storage, results: _Results | None, is_only_commit: bool) -> Entry:
    step, url = commit.checkpoint.step, commit.checkpoint.url
    has_checkpoint = storage.exists(join(url, MANIFEST))
    weights = _weights_of(url, storage) if has_checkpoint else None
    if results is not None:
        are_both_known = weights is not None and results.weights is not None
        if weights == results.weights if are_both_known else is_only_commit:
            return Entry(step, url, 0, "published", metrics=results.metrics, commit=commit.name)
    if not has_checkpoint:
        return Entry(step, url, 0, "dropped", DELETED, commit=commit.name)
    return Entry(step, url, 0, commit=commit.name)


def _weights_of(url: str, storage: Storage) -> str | None:
    try:
        return manifest_sha256(weights_url(url, storage), storage)
    except CheckpointError:
        return None
