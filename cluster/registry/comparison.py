"""Decide whether a checkpoint is better than a registered model, on the images on which both were evaluated."""

from __future__ import annotations

from dataclasses import dataclass

from m2f.cluster.compare.intervals import NUM_DRAWS, Interval, image_intervals
from m2f.cluster.compare.records import RunRecord
from m2f.cluster.compare.set_result import SetResult
from m2f.cluster.evaluation.choice import HEADLINE
from m2f.eval.results.images import IMAGES_FILE
from m2f.model.errors import UserError


class RegistryError(UserError):
    """A model cannot be registered or found. The message names the run or model, and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Result of a comparison by paired bootstrap: the interval of the difference and whether it lies above 0."""

    better: bool
    interval: Interval

    def __str__(self) -> str:
        interval = self.interval
        name = interval.metric.rpartition("/")[2]
        return (
            f"{interval.metric} of {interval.run} minus {interval.baseline}: {interval.value:+.2f} {name}, "
            f"95 % interval {interval.low:+.2f} to {interval.high:+.2f} over {interval.images} images"
        )


def compare_checkpoints(champion: RunRecord, candidate: RunRecord, dataset: str, metric: str | None = None) -> Verdict:
    """Compare two checkpoints. The candidate is better if the whole interval of the difference lies above 0.

    Args:
        champion: the registered checkpoint, with the results of its step.
        candidate: the checkpoint to register.
        dataset: label of the evaluation set.
        metric: `PQ`, `AP` or `mIoU`; None takes the first one that both have.

    Raises:
        RegistryError: a side was not evaluated on the set, or the images or settings of the evaluations differ.
    """
    results = [_result(record, dataset) for record in (champion, candidate)]
    _check_comparable(champion, candidate, dataset, *results)
    shared_metrics = [name for name in HEADLINE if all(result.metrics.get(name) is not None for result in results)]
    if metric is not None and metric not in shared_metrics:
        raise RegistryError(
            f"--metric is {metric}, which is not available for {dataset}; choose one of: "
            f"{', '.join(shared_metrics) or 'none'}"
        )
    if not shared_metrics:
        raise RegistryError(f"{dataset}: {champion.name} and {candidate.name} have no metric in common")
    name = f"{dataset}/{metric or shared_metrics[0]}"
    found = image_intervals([champion, candidate], [name], NUM_DRAWS)
    if not found:
        raise RegistryError(
            f"{dataset}: no interval of {name} can be computed for {champion.name} and {candidate.name}; evaluate both "
            f"again with m2f eval, so that both have {IMAGES_FILE} of the same images"
        )
    return Verdict(better=found[0].low > 0, interval=found[0])


def check_weights(record: RunRecord, dataset: str, step: int, weights: str | None) -> None:
    """Raise RegistryError if the results of a set belong to other weights than those of the checkpoint.

    This happens if a step was trained again after its evaluation. `weights` is the SHA-256 in the checkpoint; nothing
    is checked if it is unknown, or if the set has no results.
    """
    found = record.results.get(dataset)
    if found is None or not weights:
        return
    used = (found.settings or {}).get("weights")
    if used != weights:
        raise RegistryError(
            f"{record.name}: the results of {dataset} at step {step} belong to different weights (SHA-256 "
            f"{str(used)[:12] if used else 'not stated'}) than the checkpoint (SHA-256 {weights[:12]}); evaluate that "
            "checkpoint again with m2f eval"
        )


def _result(record: RunRecord, dataset: str) -> SetResult:
    found = record.results.get(dataset)
    if found is None or dataset not in record.images:
        sets = ", ".join(sorted(record.results)) or "none"
        raise RegistryError(
            f"{record.name} has no results with {IMAGES_FILE} for the set {dataset} at the registered step (sets: "
            f"{sets}); evaluate that checkpoint with m2f eval"
        )
    return found


def _check_comparable(
    champion: RunRecord, candidate: RunRecord, dataset: str, first: SetResult, second: SetResult
) -> None:
    names = f"{champion.name} and {candidate.name}"
    if first.fingerprint != second.fingerprint or first.num_images != second.num_images:
        raise RegistryError(
            f"{dataset}: {names} were evaluated on different data ({first.fingerprint[:12]} with {first.num_images} "
            f"images, {second.fingerprint[:12]} with {second.num_images}); evaluate both on one set with m2f eval"
        )
    settings = [{**(result.settings or {}), "weights": None} for result in (first, second)]
    if settings[0] != settings[1]:
        differing = sorted(k for k in {*settings[0], *settings[1]} if settings[0].get(k) != settings[1].get(k))
        raise RegistryError(
            f"{dataset}: {names} were evaluated with different settings ({', '.join(differing)}), which alone may "
            "change the numbers; evaluate both with m2f eval and the same settings"
        )
