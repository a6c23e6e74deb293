"""Inference without the cost of launching: one CUDA graph per size of image."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m2f.model.structures import Predictions

Forward = Callable[[Tensor], Predictions]


def replay_forward(model: nn.Module) -> None:
    """From now on a model on a GPU replays its forward pass for sizes that it has seen; on a CPU nothing changes.

    For inference only. Weights may change in place, but hooks and Python code inside the model no longer run.
    """
    if next(model.parameters()).device.type == "cuda":
        model.forward = ReplayedForward(model.forward)


class _Recording(NamedTuple):
    """A captured forward pass: it reads `images` and writes `predictions`, always at the same addresses."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    predictions: Predictions

    def replay(self, images: Tensor) -> Predictions:
        self.images.copy_(images)
        self.graph.replay()
        classes, embeddings, features = (tensor.clone() for tensor in self.predictions[:3])  # evaluation has no others
        return Predictions(classes, embeddings, features)


class ReplayedForward:
    """Runs `forward` as it is for the first images of a size, records it with the second, then replays.

    The first pass warms up what a graph cannot hold: compiling kernels, choosing algorithms. A recording must give what
    the pass as it is gives, or it is dropped with a warning and nothing is recorded any more. The last
    `max_recordings` sizes used are kept.
    """

    def __init__(self, forward: Forward, max_recordings: int = 16) -> None:
        self._forward, self._max_recordings = forward, max_recordings
        self._recordings: OrderedDict[Any, _Recording | None] = OrderedDict()
        """By size; None for a size seen once."""
        self._pool: Any = None
        self._works = True

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Predictions:
        """As the model's forward, from images [B, 3, H, W]."""
        if not self._works:
            return self._forward(images)
        size = (images.shape, images.stride(), images.dtype, torch.is_autocast_enabled("cuda"))
        is_new = size not in self._recordings
        recording = self._recordings.setdefault(size, None)
        self._recordings.move_to_end(size)
        if len(self._recordings) > self._max_recordings:
            self._recordings.popitem(last=False)
        if recording is not None:
            return recording.replay(images)
        expected = self._forward(images)
        if not is_new:
            self._recordings[size] = self._checked(images, expected)
        return expected

    def _checked(self, images: Tensor, expected: Predictions) -> _Recording | None:
        """A recording that gives what is expected, or None, once and for all."""
        try:
            recording = self._record(images)
            if _agree(recording.replay(images), expected):
                return recording
            trouble = "it predicts something else"
        except RuntimeError as error:
            trouble = str(error)
        self._works = False
        self._recordings.clear()
        warnings.warn(f"the model cannot be replayed as a CUDA graph ({trouble}); it runs as usual", stacklevel=4)
        return None

    def _record(self, images: Tensor) -> _Recording:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        static = images.clone()
        graph = torch.cuda.CUDAGraph()
        # Weights that autocast has cached before would be gone at the next replay.
        uncached = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        with uncached, torch.cuda.graph(graph, pool=self._pool):
            predictions = self._forward(static)
        return _Recording(graph, static, predictions)


def _agree(found: Predictions, expected: Predictions) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True) for a, b in zip(found[:3], expected[:3], strict=True)
    )
