"""Progress of a run: small, exact, and stored with every checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace

from m2f.data_pipeline.documents import parse_json
from m2f.trainer.errors import CheckpointError
from m2f.trainer.job import PositionRange
from m2f.trainer.recovery.spikes import LossHistory


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Progress of a run after a step, and the properties that a resuming run must share."""

    step: int = 0
    """Optimizer steps done, without skipped ones."""
    position: int = 0
    """Samples consumed, including those of skipped steps. It determines the state of the data order."""
    skipped: int = 0
    """Number of consecutive steps skipped up to now."""
    skipped_total: int = 0
    order_fingerprint: str
    order_start: int = 0
    """Position at which this order started; above 0 only if the run's data was changed."""
    seed: int
    world_size: int
    zero_stage: int
    losses: LossHistory = field(default_factory=LossHistory)

    def advance(self, samples: int, applied: bool) -> TrainState:
        """Return the state after an optimizer step over `samples` positions. A skipped step consumes them too."""
        return replace(
            self,
            step=self.step + applied,
            position=self.position + samples,
            skipped=0 if applied else self.skipped + 1,
            skipped_total=self.skipped_total + (not applied),
        )

    def inside(self, positions: PositionRange) -> bool:
        """Return whether the run has consumed at least one of these positions and none after them.

        If so, a spike there may have changed the weights.
        """
        return positions.start < self.position <= positions.stop

    def with_order(self, fingerprint: str, url: str, accept_changes: bool) -> TrainState:
        """Return the state for resuming from checkpoint `url` with the data order that has this `fingerprint`.

        If the checkpoint has another order and `accept_changes` is set, the new order starts at the position of the
        checkpoint. Without `accept_changes`, another order raises CheckpointError.
        """
        if self.order_fingerprint == fingerprint:
            return self
        if accept_changes:
            return replace(self, order_fingerprint=fingerprint, order_start=self.position)
        raise CheckpointError(
            f"checkpoint {url} was trained with another data order: the data sets, their weights or filters, the seed, "
            "data.chunk_mb, data.lanes or data.window changed; revert the change, continue with a new order "
            "(data.accept_changes=true), or start a new run from its weights"
        )

    def to_json(self) -> bytes:
        """Return the content of `state.json`."""
        return json.dumps(asdict(self), indent=1).encode()

    @staticmethod
    def from_json(data: bytes, source: str) -> TrainState:
        """Parse the content of `state.json`. Raises CheckpointError naming `source`."""
        try:
            content = parse_json(data)
            losses = content.pop("losses", {"recent": ()})  # states of version 0.1.0 have none
            return TrainState(**content, losses=LossHistory(**losses | {"recent": tuple(losses["recent"])}))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{source} is not a valid training state ({error}); resume from an older checkpoint"
            ) from error
