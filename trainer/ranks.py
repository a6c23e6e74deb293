"""What ranks tell each other before the first forward of a step: one small all-reduce on CPU."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from m2f.model.errors import UserError
from m2f.trainer.errors import PeersError

T = TypeVar("T")


@dataclass(frozen=True)
class StepFacts:
    """One rank's contribution to a step; `exchange` returns the sums over ranks. All are small exact numbers."""

    num_masks: float = 0.0
    """Ground-truth masks that the losses divide by."""
    class_weight_sum: float = 0.0
    """Denominator of the class loss."""
    micro_batches: float = 0.0
    images: float = 0.0
    """Images that count (fillers do not)."""
    substitutions: float = 0.0
    """Samples that others took the place of."""
    stop: float = 0.0
    drain: float = 0.0
    committed: float = 0.0
    """Newest committed checkpoint's step, from rank 0 only."""


class Ranks:
    """The ranks of a run as seen from one of them. Collectives run on a gloo group, beside the training's own."""

    def __init__(self, timeout_s: float) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._store: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def exchange(self, mine: StepFacts, error: BaseException | None = None) -> StepFacts:
        """The sums over all ranks.

        Where any rank brings an error, all raise a PeersError that names the ranks and their errors (or, where all
        bring the same UserError, that one).
        """
        values = [getattr(mine, field.name) for field in fields(mine)] + [float(error is not None)]
        total = self.sum(torch.tensor(values, dtype=torch.float64)).tolist()
        if total[-1]:
            self._raise_together(error)
        return StepFacts(*total[:-1])

    def check(self, error: BaseException | None = None) -> None:
        """Wait for all ranks. Where any brings an error, all raise as in `exchange`."""
        self.exchange(StepFacts(), error)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over ranks, in place, on CPU."""
        dist.all_reduce(values, group=self._group)
        return values

    def gather(self, value: T) -> list[T]:
        """The picklable value of every rank, in rank order, on every rank."""
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]

    def count(self, name: str, more: int = 0) -> int:
        """A counter that all ranks share, after adding `more`. No collective; one thread may call it at any time."""
        if self._store is None:  # a connection of its own: nothing that waits in the other one holds it up
            self._store = dist.distributed_c10d._get_default_store().clone()
        return self._store.add(f"m2f/{name}", more)

    def neighbors(self) -> tuple[int, ...]:
        """The ranks on this machine, this one among them. A collective."""
        hosts = self.gather(socket.gethostname())
        return tuple(rank for rank, host in enumerate(hosts) if host == hosts[self.rank])

    def broadcast(self, value: T) -> T:
        """Rank 0's picklable value."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def run_on_rank0(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; where it raises there, all ranks raise."""
        box = self.run_on_all(lambda: [make()] if self.is_first else [])
        return self.broadcast(box)[0]

    def run_on_all(self, make: Callable[[], T]) -> T:
        """What `make` returns on this rank; where it raises on any rank, all ranks raise."""
        box: list[T] = []
        error = None
        try:
            box.append(make())
        except Exception as caught:
            error = caught
        self.check(error)
        return box[0]

    def _raise_together(self, error: BaseException | None) -> NoReturn:
        texts = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if isinstance(error, UserError) and len(set(texts)) == 1:
            raise error  # the same mistake everywhere needs no list of ranks
        causes = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
        raise PeersError(f"training stops on all ranks: {causes}") from error
