"""Predictions from several forward passes of one image: at several sizes and mirrored, or window by window.

With several sizes, the procedure is the official one: each size is followed by its mirror image, and class scores are
summed at the original size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from m2f.data_pipeline.categories import Task
from m2f.data_pipeline.config import Shrink
from m2f.data_pipeline.transforms.augment import resize_image, shortest_edge_size
from m2f.data_pipeline.transforms.collate import EVAL_PADDING, SIZE_MULTIPLE
from m2f.eval.config import MultiScale, SlidingWindows
from m2f.eval.inference.image_output import ImageOutput
from m2f.eval.inference.window_merge import InstanceMerge, PanopticMerge
from m2f.eval.inference.windows import WindowLayout, window_places
from m2f.eval.metrics.instance_matching import InstanceDetections
from m2f.model.config import PostprocessConfig
from m2f.model.inference.class_scores import (
    ClassScores,
    View,
    Window,
    WindowScores,
    semantic_of_views,
    semantic_of_windows,
)
from m2f.model.inference.mask_resize import ImageGeometry
from m2f.model.structures import PanopticResult, Predictions

Predict = Callable[[Tensor, Tensor], Predictions]
"""Function from images [1, 3, H, W] uint8 and sizes [1, 2] (height, width) without padding to predictions."""


@dataclass(frozen=True)
class ImagePrediction:
    """Predictions for one image at its original size, for the requested tasks."""

    panoptic: PanopticResult | None = None
    instance: InstanceDetections | None = None
    """Detections, labelled by column of the class logits."""
    label_map: Tensor | None = None
    """[H, W] int64 label map."""


def predict_in_passes(
    image: np.ndarray,
    test_time: MultiScale | SlidingWindows,
    predict: Predict,
    tasks: Collection[Task],
    is_thing: Sequence[bool],
    config: PostprocessConfig,
    shrink: Shrink = "area",
) -> ImagePrediction:
    """Predict an image [H, W, 3] uint8. All tasks share the passes. MultiScale gives semantic results only."""
    if isinstance(test_time, MultiScale):
        views = list(_views(image, test_time, predict, config, shrink))
        return ImagePrediction(label_map=semantic_of_views(views, _size(image)).label_map)
    edge = test_time.shortest_edge
    size = _size(image) if edge is None else shortest_edge_size(_size(image), edge)
    resized = image if edge is None else resize_image(image, size, shrink)
    segments = PanopticMerge(size, is_thing, config) if "panoptic" in tasks else None
    detections = InstanceMerge(size, is_thing, config) if "instance" in tasks else None
    merges = [merge for merge in (segments, detections) if merge is not None]

    def windows() -> Iterator[tuple[WindowLayout, ImageOutput]]:
        for place in window_places(size, test_time.size, test_time.stride, test_time.placement):
            crop = resized[place.area.top : place.area.bottom, place.area.left : place.area.right]
            output = forward_padded(crop, _size(crop), predict)
            for merge in merges:
                merge.add(place, output)
            yield place, output

    labels = None
    if "semantic" in tasks:
        # Windows are averaged before the resize to the original size, so class scores are resized instead of masks.
        scored = (
            Window(place.area.top, place.area.left, ClassScores(*output, "class_scores")) for place, output in windows()
        )
        labels = semantic_of_windows(scored, size, _size(image)).label_map
    else:
        for _ in windows():
            pass
    return ImagePrediction(
        None if segments is None else segments.result(_size(image)),
        None if detections is None else detections.result(_size(image)),
        labels,
    )


def _views(
    image: np.ndarray, test_time: MultiScale, predict: Predict, config: PostprocessConfig, shrink: Shrink
) -> Iterator[View]:
    """Yield the class scores of the image at every size and, with `flip`, of its mirror image."""
    for shortest_edge in test_time.shortest_edges:
        resized = resize_image(image, shortest_edge_size(_size(image), shortest_edge, test_time.max_size), shrink)
        for mirrored in (False, True) if test_time.flip else (False,):
            view = resized[:, ::-1] if mirrored else resized
            if test_time.window is None:
                scores = ClassScores(*forward_padded(view, _size(image), predict), config.semantic_resize)
            else:
                places = window_places(_size(view), test_time.window, test_time.stride or test_time.window)
                scores = WindowScores(_scored_windows(view, places, predict), _size(view), _size(image))
            yield View(scores, mirrored)


def _scored_windows(image: np.ndarray, places: Sequence[WindowLayout], predict: Predict) -> Iterator[Window]:
    """Yield the scores of every window at the resolution of `image`. Each is computed on demand."""
    for place in places:
        crop = image[place.area.top : place.area.bottom, place.area.left : place.area.right]
        output = forward_padded(crop, _size(crop), predict)
        yield Window(place.area.top, place.area.left, ClassScores(*output, "class_scores"))


def forward_padded(image: np.ndarray, original_size: tuple[int, int], predict: Predict) -> ImageOutput:
    """Return the last layer's output for an image [h, w, 3] uint8, padded like evaluation batches.

    `original_size` is the (height, width) of the results after post-processing.
    """
    height, width = _size(image)
    padded_height, padded_width = (-(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE for side in (height, width))
    padded = np.empty((padded_height, padded_width, 3), dtype=np.uint8)
    padded[:] = EVAL_PADDING
    padded[:height, :width] = image
    predictions = predict(torch.from_numpy(padded).permute(2, 0, 1)[None], torch.tensor([[height, width]]))
    return ImageOutput(
        predictions.class_logits[-1, 0],
        predictions.mask_embeddings[-1, 0],
        predictions.mask_features[0],
        ImageGeometry((padded_height, padded_width), (height, width), original_size),
    )


def _size(image: np.ndarray) -> tuple[int, int]:
    height, width = image.shape[:2]
    return height, width
