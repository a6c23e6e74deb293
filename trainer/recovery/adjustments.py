"""What a run has learned about itself and every later start must keep: `adjustments.json` in the run folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.errors import ConfigError
from m2f.trainer.job import PositionRange, TrainJob

_NAME = "adjustments.json"


@dataclass(frozen=True)
class SmallerMicroBatch:
    """Out of memory: fewer images per forward, more micro-batches per step, the same global batch."""

    micro_batch: int


@dataclass(frozen=True)
class SkipPositions:
    """A loss spike: go back before it, and leave its samples out."""

    positions: PositionRange


Change = SmallerMicroBatch | SkipPositions


@dataclass(frozen=True)
class Adjustments:
    """All changes so far."""

    micro_batch: int | None = None
    """Upper bound of `training.micro_batch`; None where memory has always sufficed."""
    skipped: tuple[PositionRange, ...] = ()
    reasons: tuple[str, ...] = ()
    """One sentence per change, oldest first, for people who read the file."""

    def after(self, change: Change, reason: str) -> Adjustments:
        """With one more change."""
        reasons = (*self.reasons, reason)
        match change:
            case SmallerMicroBatch(micro_batch):
                return replace(self, micro_batch=micro_batch, reasons=reasons)
            case SkipPositions(positions):
                return replace(self, skipped=(*self.skipped, positions), reasons=reasons)

    def applied(self, job: TrainJob) -> TrainJob:
        """The job as it runs from now on."""
        most = job.training.micro_batch if self.micro_batch is None else self.micro_batch
        micro_batch = min(job.training.micro_batch, most)
        return replace(job, training=replace(job.training, micro_batch=micro_batch), skipped=self.skipped)


def read_adjustments(storage: Storage, run_folder: str) -> Adjustments:
    """What earlier starts of the run have changed. Raises ConfigError for a file that is not one of ours."""
    url = join(run_folder, _NAME)
    if not storage.exists(url):
        return Adjustments()
    try:
        content = parse_json(storage.get(url))
        micro_batch, found = content["micro_batch"], content["skipped"]
        skipped = tuple(PositionRange(_count(p["start"], 0), _count(p["stop"], 1)) for p in found)
        reasons = tuple(str(reason) for reason in content["reasons"])
        return Adjustments(None if micro_batch is None else _count(micro_batch, 1), skipped, reasons)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{url} cannot be read ({error}); repair it, or delete it to start without its changes"
        ) from error


def adjust(storage: Storage, run_folder: str, change: Change, reason: str) -> Adjustments:
    """Add a change for every later start; returns all of them."""
    adjustments = read_adjustments(storage, run_folder).after(change, reason)
    storage.put(join(run_folder, _NAME), json.dumps(asdict(adjustments), indent=1).encode())
    return adjustments


def _count(value: object, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{value!r} where a whole number of at least {least} belongs")
    return value
