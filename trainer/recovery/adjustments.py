"""Automatic adjustments that persist across restarts of a run: `adjustments.json` in the run folder."""

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
    """Reaction to a lack of memory: fewer images per forward pass, more micro-batches, same global batch."""

    micro_batch: int


@dataclass(frozen=True)
class SkipPositions:
    """Reaction to a loss spike: resume from before it and skip its samples."""

    positions: PositionRange


Change = SmallerMicroBatch | SkipPositions


@dataclass(frozen=True)
class Adjustments:
    """All changes to a run so far."""

    micro_batch: int | None = None
    """Upper limit of `training.micro_batch`; None if memory has always sufficed."""
    skipped: tuple[PositionRange, ...] = ()
    reasons: tuple[str, ...] = ()
    """One sentence per change, oldest first, for readers of the file."""

    def after(self, change: Change, reason: str) -> Adjustments:
        """Return the adjustments with one more change."""
        reasons = (*self.reasons, reason)
        match change:
            case SmallerMicroBatch(micro_batch):
                return replace(self, micro_batch=micro_batch, reasons=reasons)
            case SkipPositions(positions):
                return replace(self, skipped=(*self.skipped, positions), reasons=reasons)

    def applied(self, job: TrainJob) -> TrainJob:
        """Return the job with all changes applied."""
        limit = job.training.micro_batch if self.micro_batch is None else self.micro_batch
        micro_batch = min(job.training.micro_batch, limit)
        return replace(job, training=replace(job.training, micro_batch=micro_batch), skipped=self.skipped)


def read_adjustments(storage: Storage, run_folder: str) -> Adjustments:
    """Read the changes of earlier starts. Raises ConfigError if the file is invalid."""
    url = join(run_folder, _NAME)
    if not storage.exists(url):
        return Adjustments()
    data = storage.get(url)
    try:
        content = parse_json(data)
        micro_batch, found = content["micro_batch"], content["skipped"]
        skipped = tuple(PositionRange(_count(p["start"], 0), _count(p["stop"], 1)) for p in found)
        reasons = tuple(str(reason) for reason in content["reasons"])
        return Adjustments(None if micro_batch is None else _count(micro_batch, 1), skipped, reasons)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{url} cannot be read ({error}); repair it, or delete it to start without its adjustments"
        ) from error


def adjust(storage: Storage, run_folder: str, change: Change, reason: str) -> Adjustments:
    """Store a change for all later starts; return all changes."""
    adjustments = read_adjustments(storage, run_folder).after(change, reason)
    storage.put(join(run_folder, _NAME), json.dumps(asdict(adjustments), indent=1).encode())
    return adjustments


def _count(value: object, minimum: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"found {value!r}, expected an integer of at least {minimum}")
    return value
