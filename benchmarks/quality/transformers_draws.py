"""Record the random points that the criterion of `transformers` draws, to replay them in ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from m2f.model.loss.points import GivenPoints
from m2f.model.structures import Targets

Assignment = Sequence[tuple[Tensor, Tensor]]
"""Indices of the matched queries and of their targets for every image, for one prediction."""


@dataclass(frozen=True)
class RecordedDraws:
    """Draws of one pass through the criterion, in its order: first the last prediction, then the others in sequence."""

    drawn: list[Tensor] = field(default_factory=list)
    """For every prediction: matching points of each image, then candidates and fresh points of the matched masks."""
    assigned: list[Assignment] = field(default_factory=list)
    """Assignment of every prediction, in the order of the criterion."""

    def points(self, targets: Targets) -> GivenPoints:
        """Return the recorded points for our criterion, indexed by prediction, image and target."""
        last = len(self.assigned) - 1
        order = [last, *range(last)]
        return replay(self.drawn, [self.assigned[order.index(layer)] for layer in range(last + 1)], order, targets)


@contextmanager
def record_draws(criterion: Mask2FormerLoss) -> Iterator[RecordedDraws]:
    """Record draws and assignments of one pass; no other code may call `torch.rand` inside the context."""
    draws, rand = RecordedDraws(), torch.rand

    def recorded(*arguments: Any, **options: Any) -> Tensor:
        draws.drawn.append(rand(*arguments, **options))
        return draws.drawn[-1]

    hook = criterion.matcher.register_forward_hook(lambda module, inputs, output: draws.assigned.append(output))
    try:
        with patch.object(torch, "rand", recorded):
            yield draws
    finally:
        hook.remove()


def replay(
    drawn: Sequence[Tensor], assignments: Sequence[Assignment], order: Sequence[int], targets: Targets
) -> GivenPoints:
    """Sort draws, given in the official order, by prediction, image and target.

    The official order is, for each prediction: points of each image, candidates, fresh points.

    Args:
        drawn: random numbers in the order in which they were drawn.
        assignments: assignments, indexed by prediction.
        order: indices of the predictions in the order of the draws.
        targets: targets of the micro-batch.
    """
    layers, (images, max_targets) = len(order), targets.valid.shape
    per_layer = [drawn[i : i + images + 2] for i in range(0, len(drawn), images + 2)]
    shape = (layers, images, max_targets)
    matching = torch.zeros(layers, images, *drawn[0].shape[1:])
    candidates = torch.zeros(*shape, *drawn[images].shape[1:])
    fresh = torch.zeros(*shape, *drawn[images + 1].shape[1:])
    for layer, draws in zip(order, per_layer, strict=True):
        matching[layer] = torch.cat(list(draws[:images]))
        row = 0
        for image, (_, target_indices) in enumerate(assignments[layer]):
            for target in target_indices.tolist():
                candidates[layer, image, target] = draws[images][row]
                fresh[layer, image, target] = draws[images + 1][row]
                row += 1
    return GivenPoints(matching, candidates, fresh)
