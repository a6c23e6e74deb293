"""The points that the criterion of `transformers` draws, so that ours can be given the same ones."""

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
"""Queries and targets of every image, of one prediction."""


@dataclass(frozen=True)
class RecordedDraws:
    """One pass through the criterion, in its own order: the last prediction, then the others from the first on."""

    drawn: list[Tensor] = field(default_factory=list)
    """Of every prediction: matching points of each image, candidates and fresh points of the matched masks."""
    assigned: list[Assignment] = field(default_factory=list)
    """Of every prediction."""

    def points(self, targets: Targets) -> GivenPoints:
        """The same points by prediction, image and target, for our criterion."""
        last = len(self.assigned) - 1
        order = [last, *range(last)]
        return replayed(self.drawn, [self.assigned[order.index(layer)] for layer in range(last + 1)], order, targets)


@contextmanager
def recorded_draws(criterion: Mask2FormerLoss) -> Iterator[RecordedDraws]:
    """Record what one pass draws and how it matches; nothing else may call `torch.rand` meanwhile."""
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


def replayed(
    drawn: Sequence[Tensor], assignments: Sequence[Assignment], order: Sequence[int], targets: Targets
) -> GivenPoints:
    """Draws in the official order (per prediction: each image, candidates, fresh) by prediction, image and target.

    Args:
        drawn: what was drawn, one after the other.
        assignments: of every prediction, by its number.
        order: numbers of the predictions as they were drawn for.
        targets: of the micro-batch.
    """
    layers, (images, most) = len(order), targets.valid.shape
    per_layer = [drawn[i : i + images + 2] for i in range(0, len(drawn), images + 2)]
    shape = (layers, images, most)
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
