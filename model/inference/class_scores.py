"""Class scores of pixels: the sum over queries of class probability * mask probability, in bands of rows.

Of one prediction, or averaged over several of the same image: at other sizes, mirrored, or of windows that overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from m2f.model.inference.mask_resize import ImageGeometry, MaskResize, RowTaps, resize_columns, row_bands
from m2f.model.structures import SemanticResult


class ClassScores:
    """Scores of one prediction: class_logits [Q, K + 1], mask_embeddings [Q, C] and mask_features [C, h, w].

    `resize` says whether masks or the scores of classes are brought from the input's size to the original's.
    """

    def __init__(
        self,
        class_logits: Tensor,
        mask_embeddings: Tensor,
        mask_features: Tensor,
        geometry: ImageGeometry,
        resize: Literal["masks", "class_scores"],
    ) -> None:
        self._class_probabilities = class_logits.float().softmax(-1)[:, :-1].T.contiguous()
        self._masks = MaskResize(mask_embeddings, mask_features, geometry)
        self._resize_masks = resize == "masks"
        self.num_classes = len(self._class_probabilities)
        self.values_per_pixel = len(mask_embeddings) + self.num_classes
        self.size = geometry.resized_size
        self.device = class_logits.device

    def bands(self) -> Iterator[slice]:
        """All rows of the original, some at a time."""
        return self._masks.bands(self.values_per_pixel)

    def at(self, rows: slice) -> Tensor:
        """[K, rows, W] at rows of the original."""
        if self._resize_masks:
            return self._sum(self._masks.original(rows))
        source, taps = self._masks.to_original(rows)
        return self._masks.original_columns(taps.apply(self.at_input(source)))

    def at_input(self, rows: slice) -> Tensor:
        """[K, rows, w] at rows of the image in the model's input."""
        return self._sum(self._masks.input(rows))

    def _sum(self, mask_logits: Tensor) -> Tensor:
        return torch.einsum("kq,qhw->khw", self._class_probabilities, mask_logits.sigmoid_())


class View(NamedTuple):
    """One of several predictions of the whole image."""

    scores: ClassScores | WindowScores
    mirrored: bool
    """Of the mirrored image: its scores are mirrored back."""


@torch.no_grad()
def semantic_of_views(views: Sequence[View], original_size: tuple[int, int]) -> SemanticResult:
    """The class of a pixel maximises the sum of the views' scores at the original size, added in their order.

    Views of windows are good for one call.
    """
    height, width = original_size
    device = views[0].scores.device
    label_map = torch.empty(original_size, dtype=torch.int64, device=device)
    widest = max(width, *(view.scores.size[1] for view in views))
    values = max(view.scores.values_per_pixel for view in views) + views[0].scores.num_classes
    for rows in row_bands(height, values * widest, device):
        total = torch.zeros((), device=device)
        for view in views:
            scores = view.scores.at(rows)
            total = total + (scores.flip(-1) if view.mirrored else scores)
        label_map[rows] = total.max(0).indices
    return SemanticResult(label_map)


class Window(NamedTuple):
    """A prediction of a part of the resized image, at the model's resolution."""

    top: int
    left: int
    scores: ClassScores

    @property
    def bottom(self) -> int:
        """The row after its last."""
        return self.top + self.scores.size[0]


@torch.no_grad()
def semantic_of_windows(
    windows: Iterable[Window], resized_size: tuple[int, int], original_size: tuple[int, int]
) -> SemanticResult:
    """The class of a pixel maximises the mean score of the windows over it, brought to the original size.

    Windows must cover the resized image and come in ascending `top`. They are taken as they are needed and dropped
    when they are done with, so only the masks of few rows of windows are in memory.
    """
    scores = WindowScores(windows, resized_size, original_size)
    label_map = torch.empty(original_size, dtype=torch.int64, device=scores.device)
    values_per_row = scores.values_per_pixel * max(resized_size[1], original_size[1])
    for rows in row_bands(original_size[0], values_per_row, scores.device):
        label_map[rows] = scores.at(rows).max(0).indices
    return SemanticResult(label_map)


class WindowScores:
    """Mean scores of windows of the resized image, at the original's size; taken as `semantic_of_windows` says."""

    def __init__(
        self, windows: Iterable[Window], resized_size: tuple[int, int], original_size: tuple[int, int]
    ) -> None:
        self._mean = _WindowMean(windows, resized_size[1])
        self._to_original = RowTaps.between(resized_size[0], original_size[0])
        self._width = original_size[1]
        self.size = resized_size
        self.num_classes, self.values_per_pixel = self._mean.num_classes, self._mean.values_per_pixel
        self.device = self._mean.device

    def at(self, rows: slice) -> Tensor:
        """[K, rows, W] at rows of the original, which are asked for in ascending order."""
        source, taps = self._to_original.for_rows(rows)
        return resize_columns(taps.apply(self._mean.at(source)), self._width)


class _WindowMean:
    """Mean scores of windows by rows of the image that they cover; rows are asked for in ascending order."""

    def __init__(self, windows: Iterable[Window], width: int) -> None:
        self._coming = iter(windows)
        self._next: Window | None = next(self._coming)
        self._open: list[Window] = []
        self._width = width
        first = self._next.scores
        self.num_classes = first.num_classes
        self.values_per_pixel = first.values_per_pixel + first.num_classes
        self.device = first.device

    def at(self, rows: slice) -> Tensor:
        """[K, rows, width]"""
        self._open = [window for window in self._open if window.bottom > rows.start]
        while self._next is not None and self._next.top < rows.stop:
            self._open.append(self._next)
            self._next = next(self._coming, None)
        height = rows.stop - rows.start
        total = torch.zeros(self.num_classes, height, self._width, device=self.device)
        count = torch.zeros(height, self._width, device=self.device)
        for window in self._open:
            first, stop = max(rows.start, window.top), min(rows.stop, window.bottom)
            if first < stop:
                covered = (
                    slice(first - rows.start, stop - rows.start),
                    slice(window.left, window.left + window.scores.size[1]),
                )
                total[:, *covered] += window.scores.at_input(slice(first - window.top, stop - window.top))
                count[covered] += 1
        return total / count
