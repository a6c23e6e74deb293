"""Semantic segmentation from several forward passes of one image: at other sizes and mirrored, or window by window.

Several sizes follow the official procedure: every size, then the same mirrored, scores at the original size added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from m2f.data_pipeline.config import Shrink
from m2f.data_pipeline.transforms.augment import resize_image, shortest_edge_size
from m2f.data_pipeline.transforms.collate import EVAL_PADDING, SIZE_MULTIPLE
from m2f.eval.config import MultiScale, SlidingWindows
from m2f.model.config import PostprocessConfig
from m2f.model.inference.class_scores import ClassScores, View, Window, semantic_of_views, semantic_of_windows
from m2f.model.inference.mask_resize import ImageGeometry
from m2f.model.structures import Predictions

Predict = Callable[[Tensor, Tensor], Predictions]
"""From images [1, 3, H, W] uint8 and the sizes [1, 2] of what they show inside the padding."""


def label_map(
    image: np.ndarray,
    test_time: MultiScale | SlidingWindows,
    predict: Predict,
    config: PostprocessConfig,
    shrink: Shrink = "area",
) -> Tensor:
    """Labels [H, W] int64 of an image [H, W, 3] uint8. Masks at stride 4 are all that is kept of a forward pass."""
    height, width = image.shape[:2]
    match test_time:
        case MultiScale():
            views = list(_views(image, test_time, predict, config, shrink))
            return semantic_of_views(views, (height, width)).label_map
        case SlidingWindows(shortest_edge=edge):
            size = (height, width) if edge is None else shortest_edge_size((height, width), edge)
            resized = image if edge is None else resize_image(image, size, shrink)
            windows = _windows(resized, test_time, predict)
            return semantic_of_windows(windows, size, (height, width)).label_map
        case _:
            assert_never(test_time)


def window_starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows start along a side, the last one moved back to end with it."""
    last = max(0, length - size)
    return [*range(0, last, stride), last]


def _views(
    image: np.ndarray, test_time: MultiScale, predict: Predict, config: PostprocessConfig, shrink: Shrink
) -> Iterator[View]:
    height, width = image.shape[:2]
    for shortest_edge in test_time.shortest_edges:
        size = shortest_edge_size((height, width), shortest_edge, test_time.max_size)
        resized = resize_image(image, size, shrink)
        for mirrored in (False, True) if test_time.flip else (False,):
            view = resized[:, ::-1] if mirrored else resized
            yield View(_scores(view, (height, width), predict, config), mirrored)


def _windows(image: np.ndarray, test_time: SlidingWindows, predict: Predict) -> Iterator[Window]:
    # Each at its own resolution, where scores are averaged; so it is scores that are resized afterwards.
    config = PostprocessConfig(semantic_resize="class_scores")
    side = test_time.size
    for top, left in product(*(window_starts(length, side, test_time.stride) for length in image.shape[:2])):
        crop = image[top : top + side, left : left + side]
        height, width = crop.shape[:2]
        yield Window(top, left, _scores(crop, (height, width), predict, config))


def _scores(
    image: np.ndarray, original_size: tuple[int, int], predict: Predict, config: PostprocessConfig
) -> ClassScores:
    """One forward pass of an image [h, w, 3], padded as evaluation batches are."""
    height, width = image.shape[:2]
    padded_height, padded_width = (-(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE for side in (height, width))
    padded = np.empty((padded_height, padded_width, 3), dtype=np.uint8)
    padded[:] = EVAL_PADDING
    padded[:height, :width] = image
    predictions = predict(torch.from_numpy(padded).permute(2, 0, 1)[None], torch.tensor([[height, width]]))
    return ClassScores(
        predictions.class_logits[-1, 0],
        predictions.mask_embeddings[-1, 0],
        predictions.mask_features[0],
        ImageGeometry((padded_height, padded_width), (height, width), original_size),
        config.semantic_resize,
    )
