"""A step that the device was given, whose scalars the host reads once: in one copy, when they are there anyway."""

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
    """One rank's scalars of one step."""

    norm: float
    """Global gradient norm; not finite where the update was skipped."""
    loss_share: float
    """This rank's part of the total loss."""
    terms: Tensor
    """[3] float64 on CPU, see `loss_terms`."""


class QueuedStep:
    """A step between `Engine.update` and `Engine.settle`. Its scalars go to the host; the device does not wait."""

    def __init__(self, batches: StepBatches, images: float, losses: Sequence[Losses], norm: Tensor | float) -> None:
        """`images` are those that count, of all ranks; `norm` is what `Engine.update` returned."""
        self.batches, self.images, self.losses = batches, images, losses
        self._known_norm = None if isinstance(norm, Tensor) else norm
        parts = [loss_terms(losses), *(loss.total.reshape(1).double() for loss in losses)]
        if isinstance(norm, Tensor):
            parts.append(norm.reshape(1).double())
        self._copy = HostCopy(torch.cat(parts))

    def read(self) -> StepValues:
        """The scalars, once the device has got that far."""
        values = torch.from_numpy(self._copy.wait())
        terms, totals, norm = values.split([3, len(self.losses), len(values) - 3 - len(self.losses)])
        return StepValues(
            norm=float(norm) if self._known_norm is None else self._known_norm,
            loss_share=sum(totals.tolist()),
            terms=terms,
        )


def loss_terms(losses: Sequence[Losses]) -> Tensor:
    """Class, mask and dice losses of one step from all micro-batches of this rank: [3] float64, on their device."""
    return torch.stack([loss.terms.sum(0) for loss in losses]).double().sum(0)
