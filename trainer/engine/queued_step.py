"""A step queued on the device, whose scalars the host reads in one copy once they are available."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m2f.data_pipeline.loading.loader import StepBatches
from m2f.model.loss.criterion import Losses
from m2f.model.loss.host_copies import HostCopy


@dataclass(frozen=True)
class StepValues:
    """Scalars of one step on one rank."""

    norm: float
    """Global gradient norm; not finite if the update was skipped."""
    loss_share: float
    """This rank's part of the total loss."""
    terms: Tensor
    """[3] float64 on CPU, see `loss_terms`."""


class QueuedStep:
    """A step between `Engine.update` and `Engine.finish_update`. Its scalars are copied to the host asynchronously."""

    def __init__(self, batches: StepBatches, images: float, losses: Sequence[Losses], norm: Tensor | float) -> None:
        """`images` counts the real images of all ranks; `norm` is the result of `Engine.update`."""
        self.batches, self.images, self.losses = batches, images, losses
        self._known_norm = None if isinstance(norm, Tensor) else norm
        parts = [loss_terms(losses), *(loss.total.reshape(1).double() for loss in losses)]
        if isinstance(norm, Tensor):
            parts.append(norm.reshape(1).double())
        self._copy = HostCopy(torch.cat(parts))

    def read(self) -> StepValues:
        """Return the scalars; wait until the device has computed them."""
        values = torch.from_numpy(self._copy.wait())
        terms, totals, norm = values.split([3, len(self.losses), len(values) - 3 - len(self.losses)])
        return StepValues(
            norm=float(norm) if self._known_norm is None else self._known_norm,
            loss_share=sum(totals.tolist()),
            terms=terms,
        )


def loss_terms(losses: Sequence[Losses]) -> Tensor:
    """Sum the class, mask and dice losses of this rank's micro-batches: [3] float64, on the device of the losses."""
    return torch.stack([loss.terms.sum(0) for loss in losses]).double().sum(0)
