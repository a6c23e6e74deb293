"""Class scores of pixels: the sum over queries of class probability * mask probability, in bands of rows.

Scores come from one prediction, or are averaged over several predictions of the same image: at other sizes, mirrored,
or of overlapping windows.
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

    `resize` selects the tensors that are resized from the input to the original size: masks or class scores.
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
        """Return slices that together cover all rows of the original image."""
        return self._masks.bands(self.values_per_pixel)

    def at(self, rows: slice) -> Tensor:
        """Return scores [K, rows, W] for rows of the original image."""
        if self._resize_masks:
            return self._sum(self._masks.original(rows))
        source, taps = self._masks.to_original(rows)
        return self._masks.original_columns(taps.apply(self.at_input(source)))

    def at_input(self, rows: slice) -> Tensor:
        """Return scores [K, rows, w] for rows of the image in the model's input."""
        return self._sum(self._masks.input(rows))

    def _sum(self, mask_logits: Tensor) -> Tensor:
        return torch.einsum("kq,qhw->khw", self._class_probabilities, mask_logits.sigmoid_())


class View(NamedTuple):
    """One of several predictions of the whole image."""

    scores: ClassScores | WindowScores
    mirrored: bool
    """Whether the image was mirrored; its scores are then mirrored back."""


@torch.no_grad()
def semantic_of_views(views: Sequence[View], original_size: tuple[int, int]) -> SemanticResult:
    """Return the class with the highest sum of the views' scores, for each pixel of the original image.

    Scores are added in the order of the views. Views made of windows can be used for one call only.
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
    """A prediction of part of the resized image, at the model's resolution."""

    top: int
    """First row of the window in the resized image, in pixels."""
    left: int
    """First column of the window in the resized image, in pixels."""
    scores: ClassScores

    @property
    def bottom(self) -> int:
        """Return the row after the last one."""
        return self.top + self.scores.size[0]


@torch.no_grad()
def semantic_of_windows(
    windows: Iterable[Window], resized_size: tuple[int, int], original_size: tuple[int, int]
) -> SemanticResult:
    """Return the class with the highest mean score over all windows that cover a pixel, at the original size.

    Windows must cover the resized image and come in ascending order of `top`. Each window is fetched when needed and
    dropped after use, so memory holds only the masks of windows in a few rows.
    """
    scores = WindowScores(windows, resized_size, original_size)
    label_map = torch.empty(original_size, dtype=torch.int64, device=scores.device)
    values_per_row = scores.values_per_pixel * max(resized_size[1], original_size[1])
    for rows in row_bands(original_size[0], values_per_row, scores.device):
        label_map[rows] = scores.at(rows).max(0).indices
    return SemanticResult(label_map)


class WindowScores:
    """Mean scores of windows of the resized image, at the original size.

    Windows must come in the order that `semantic_of_windows` requires.
    """

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
        """Return scores [K, rows, W] for rows of the original image. Calls must be in ascending order of rows."""
        source, taps = self._to_original.for_rows(rows)
        return resize_columns(taps.apply(self._mean.at(source)), self._width)


class _WindowMean:
    """Mean scores of windows for rows of the resized image. Calls must be in ascending order of rows."""

    def __init__(self, windows: Iterable[Window], width: int) -> None:
        self._remaining = iter(windows)
        self._next: Window | None = next(self._remaining)
        self._active: list[Window] = []
        self._width = width
        first = self._next.scores
        self.num_classes = first.num_classes
        self.values_per_pixel = first.values_per_pixel + first.num_classes
        self.device = first.device

    def at(self, rows: slice) -> Tensor:
        """Return mean scores [K, rows, width]."""
        self._active = [window for window in self._active if window.bottom > rows.start]
        while self._next is not None and self._next.top < rows.stop:
            self._active.append(self._next)
            self._next = next(self._remaining, None)
        height = rows.stop - rows.start
        total = torch.zeros(self.num_classes, height, self._width, device=self.device)
        count = torch.zeros(height, self._width, device=self.device)
        for window in self._active:
            first, stop = max(rows.start, window.top), min(rows.stop, window.bottom)
            if first < stop:
                covered = (
                    slice(first - rows.start, stop - rows.start),
                    slice(window.left, window.left + window.scores.size[1]),
                )
                total[:, *covered] += window.scores.at_input(slice(first - window.top, stop - window.top))
                count[covered] += 1
        return total / count
