"""Mask losses, row by row for training and between all pairs for matching.

The pixel loss is binary cross-entropy (Mask2Former) or focal loss (MaskFormer). Dice has one value per mask, from sums
over its pixels or points. Labels may be soft. Axis letters: R rows, P pixels or points, Q queries, N targets.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MaskLoss = Literal["bce", "focal"]

FOCAL_ALPHA = 0.25
"""Weight of pixels inside the target; pixels outside have weight 1 - alpha (Lin et al., ICCV 2017)."""

_PRODUCT_ROUNDS = 4
"""Number of times that pairs of sigmoids are multiplied before the logarithm is taken. A product of three per round is
the longest, 81 in all, and at least 2^-81; fp32 ends at 2^-126."""


def row_losses(logits: Tensor, labels: Tensor, kind: MaskLoss, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean BCE or focal loss over pixels and the dice loss, [R] each, from logits and labels [R, P].

    With `weights` [R, P], every pixel is weighted in all sums. The mean still divides by P.
    """
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    probabilities = logits.sigmoid()
    if kind == "focal":
        hit = probabilities * labels + (1 - probabilities) * (1 - labels)
        alpha = FOCAL_ALPHA * labels + (1 - FOCAL_ALPHA) * (1 - labels)
        losses = alpha * losses * (1 - hit).square()
    predicted = probabilities
    if weights is not None:
        losses, predicted, labels = losses * weights, predicted * weights, labels * weights
    overlap = (probabilities * labels).sum(1)
    dice = 1 - (2 * overlap + 1) / (predicted.sum(1) + labels.sum(1) + 1)
    return losses.mean(1), dice


class PairwiseSums(NamedTuple):
    """Sums over some pixels for all pairs of a query and a target. Sums over disjoint pixels can be added."""

    loss: Tensor
    """[..., Q, N] sum of pixel losses."""
    overlap: Tensor
    """[..., Q, N] sum of probability times label."""
    area: Tensor
    """[..., Q, N] sum of probabilities plus sum of labels."""

    def plus(self, other: PairwiseSums) -> PairwiseSums:
        """Return the sums over both sets of pixels."""
        return PairwiseSums(*(mine + others for mine, others in zip(self, other, strict=True)))

    def cost(self, num_pixels: int, mask_weight: float, dice_weight: float) -> Tensor:
        """Return the weighted sum of mean pixel loss and dice [..., Q, N]."""
        dice = 1 - (2 * self.overlap + 1) / (self.area + 1)
        return mask_weight * (self.loss / num_pixels) + dice_weight * dice


def pairwise_sums(logits: Tensor, labels: Tensor, kind: MaskLoss, weights: Tensor | None = None) -> PairwiseSums:
    """Return the sums of all pairs from logits [..., Q, P] (overwritten) and labels [..., N, P].

    `weights` [..., P] weight the pixels. A pixel's loss is linear in its label: the loss for label 0, minus the label
    times the difference between the losses for labels 0 and 1. For BCE these are softplus(x) and x. The sum over pixels
    is therefore a row sum and one matrix product.
    """
    if weights is not None:
        labels = labels * weights[..., None, :]
    if kind == "bce":
        outside = _softplus_sums(logits) if weights is None else _row_sums(F.softplus(logits), weights)
        loss = outside - _pair_sums(logits, labels)
        probabilities = logits.sigmoid_()
    else:
        outside = (1 - FOCAL_ALPHA) * F.softplus(logits)
        inside = FOCAL_ALPHA * F.softplus(-logits)
        probabilities = logits.sigmoid_()
        outside *= probabilities.square()
        inside *= (1 - probabilities).square()
        loss = _row_sums(outside, weights) - _pair_sums(outside - inside, labels)
    area = _row_sums(probabilities, weights) + labels.sum(-1)[..., None, :]
    return PairwiseSums(loss, _pair_sums(probabilities, labels), area)


def _pair_sums(values: Tensor, labels: Tensor) -> Tensor:
    """Return the sums [..., Q, N] of values [..., Q, P] times labels [..., N, P].

    With the few labels on the left, a CPU needs half the time, and an eighth if Q is the contiguous axis of `values`.
    """
    return (labels @ values.transpose(-1, -2)).transpose(-1, -2)


def _softplus_sums(logits: Tensor) -> Tensor:
    """Return the sums [..., Q, 1] of log(1 + exp(x)) over the logits [..., Q, P].

    On a CPU, torch's softplus takes 3 to 13 times as long as this form: max(x, 0) - log(sigmoid(|x|)), with one
    logarithm for the product of at least 16 sigmoids. Sigmoids of positive numbers are at least 1/2, so the product
    does not underflow.
    """
    if logits.device.type != "cpu":
        return F.softplus(logits).sum(-1, keepdim=True)
    buffer = logits.abs()
    factors = buffer.sigmoid_()
    for _ in range(_PRODUCT_ROUNDS):
        half, is_odd = divmod(factors.shape[-1], 2)
        if half == 0:
            break
        products = factors[..., :half] * factors[..., half : 2 * half]
        if is_odd:
            products[..., :1] *= factors[..., -1:]
        factors = products
    logarithms = factors.log_().sum(-1, keepdim=True)
    return torch.clamp_min(logits, 0, out=buffer).sum(-1, keepdim=True) - logarithms


def _row_sums(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weighted sums [..., Q, 1] of values [..., Q, P]."""
    return values.sum(-1, keepdim=True) if weights is None else values @ weights[..., None]
