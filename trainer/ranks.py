"""Communication between ranks on CPU, such as the small all-reduce before the first forward pass of a step."""

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
    """One rank's contribution to a step. `exchange` returns the sums over all ranks, computed in float64."""

    num_masks: float = 0.0
    """Ground-truth masks, by which the mask losses are divided."""
    class_weight_sum: float = 0.0
    """Denominator of the class loss."""
    micro_batches: float = 0.0
    images: float = 0.0
    """Real images, without fillers."""
    substitutions: float = 0.0
    """Samples that were replaced by others."""
    stop: float = 0.0
    """1 on rank 0 if the user wants the run to end."""
    drain: float = 0.0
    """1 on rank 0 if a machine is about to go away."""
    committed: float = 0.0
    """Step of the newest committed checkpoint; set by rank 0 only."""


class Ranks:
    """The ranks of a run, seen from one of them. Collectives run on a gloo group, separate from that of training."""

    def __init__(self, timeout_s: float) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._store: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def exchange(self, own: StepFacts, error: BaseException | None = None) -> StepFacts:
        """Return the sums over all ranks.

        If any rank passes an error, all ranks raise a PeersError that names the ranks and their errors. If all ranks
        pass the same UserError, they raise that one instead.
        """
        values = [getattr(own, field.name) for field in fields(own)] + [float(error is not None)]
        total = self.sum(torch.tensor(values, dtype=torch.float64)).tolist()
        if total[-1]:
            self._raise_on_all_ranks(error)
        return StepFacts(*total[:-1])

    def check(self, error: BaseException | None = None) -> None:
        """Wait for all ranks. If any passes an error, all raise as in `exchange`."""
        self.exchange(StepFacts(), error)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` (on CPU) elementwise over ranks, in place, and return them."""
        dist.all_reduce(values, group=self._group)
        return values

    def gather(self, value: T) -> list[T]:
        """Return the picklable values of all ranks on every rank, in rank order."""
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]

    def count(self, name: str, increment: int = 0) -> int:
        """Add to a counter shared by all ranks and return it. Not a collective: any rank may call it alone."""
        if self._store is None:  # a separate connection, which blocking requests of others cannot delay
            self._store = dist.distributed_c10d._get_default_store().clone()
        return self._store.add(f"m2f/{name}", increment)

    def neighbors(self) -> tuple[int, ...]:
        """Return the ranks on this machine, including this one. Every rank must call it."""
        hosts = self.gather(socket.gethostname())
        return tuple(rank for rank, host in enumerate(hosts) if host == hosts[self.rank])

    def broadcast(self, value: T) -> T:
        """Return rank 0's picklable value on every rank. Every rank must call it."""
        results = [value]
        dist.broadcast_object_list(results, src=0, group=self._group)
        return results[0]

    def run_on_rank0(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0; return its result on every rank.

        If it raises, all ranks raise. Every rank must call this method.
        """
        results = self.run_on_all(lambda: [function()] if self.is_first else [])
        return self.broadcast(results)[0]

    def run_on_all(self, function: Callable[[], T]) -> T:
        """Call `function` on every rank; return this rank's result.

        If it raises on any rank, all raise. Every rank must call this method.
        """
        results: list[T] = []
        error = None
        try:
            results.append(function())
        except Exception as caught:
            error = caught
        self.check(error)
        return results[0]

    def _raise_on_all_ranks(self, error: BaseException | None) -> NoReturn:
        texts = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if isinstance(error, UserError) and len(set(texts)) == 1:
            raise error  # the same user error on all ranks needs no list of ranks
        causes = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
        raise PeersError(f"training stops on all ranks: {causes}") from error
