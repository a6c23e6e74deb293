"""Inference without kernel launch overhead: one CUDA graph per image size."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m2f.model.constants import reusable_constants
from m2f.model.structures import Predictions

Forward = Callable[[Tensor], Predictions]


def replay_forward(model: nn.Module) -> None:
    """Make a model on a GPU replay its forward pass for image sizes seen twice before. On a CPU nothing changes.

    For inference only. Weights may change in place, but hooks and Python code inside the model no longer run.
    """
    if next(model.parameters()).device.type == "cuda":
        # A model that refers to itself would keep its memory, and that of its graphs, until a garbage collection.
        method = weakref.WeakMethod(model.forward)

        def forward(images: Tensor) -> Predictions:
            bound = method()
            assert bound is not None, "the model is in use"
            return bound(images)

        model.forward = ReplayedForward(forward)


class _Recording(NamedTuple):
    """A captured forward pass: it reads `images` and writes `predictions`, always at the same addresses."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    predictions: Predictions
    constants: dict[Hashable, object]
    """Tensors outside the graph's memory that it reads, which must therefore continue to exist."""

    def replay(self, images: Tensor) -> Predictions:
        self.images.copy_(images)
        self.graph.replay()
        classes, embeddings, features = (tensor.clone() for tensor in self.predictions[:3])  # the rest is for training
        return Predictions(classes, embeddings, features)


class ReplayedForward:
    """Runs `forward` directly for the first images of a size, records it with the second, and replays it afterwards.

    The first pass runs everything that a graph cannot contain, such as compiling kernels and choosing algorithms. A
    recording must reproduce the direct result. Otherwise it is dropped with a warning and recording stops. The
    `max_recordings` most recently used sizes are kept. A size whose recording was dropped is not recorded again: with
    many sizes, recording would take longer than replaying saves. Threads may share an instance, also on different
    streams.
    """

    def __init__(self, forward: Forward, max_recordings: int = 16) -> None:
        self._forward, self._max_recordings = forward, max_recordings
        self._recordings: OrderedDict[Any, _Recording] = OrderedDict()
        """Recordings by the images' shape, strides and dtype, and by autocast."""
        self._seen: set[Any] = set()
        """Sizes that ran directly and may be recorded next time."""
        self._dropped: set[Any] = set()
        self._lock = threading.Lock()  # replays share their input and output
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._replayed: torch.cuda.Event | None = None
        """The end of the last replay, for which replays on other streams wait."""
        self._is_enabled = True

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Predictions:
        """Return the model's predictions for images [B, 3, H, W]."""
        with self._lock, torch.cuda.device_of(images):  # a graph on another current device would be empty
            return self._run(images)

    def _run(self, images: Tensor) -> Predictions:
        size = (images.shape, images.stride(), images.dtype, torch.is_autocast_enabled("cuda"))
        if not self._is_enabled or size in self._dropped:
            return self._forward(images)
        if size in self._recordings:
            self._recordings.move_to_end(size)
            return self._replay(self._recordings[size], images)
        is_new = size not in self._seen
        with reusable_constants() as constants:
            expected = self._forward(images)
            if not is_new:
                self._keep(size, self._checked(images, expected, constants))
        self._seen.add(size)
        return expected

    def _replay(self, recording: _Recording, images: Tensor) -> Predictions:
        if self._replayed is None:
            self._replayed = torch.cuda.Event()
        else:
            self._replayed.wait()
        predictions = recording.replay(images)
        self._replayed.record()
        return predictions

    def _keep(self, size: Any, recording: _Recording | None) -> None:
        """Keep a recording, and drop the one that was used least recently if there are too many."""
        if recording is not None:
            self._recordings[size] = recording
        if len(self._recordings) > self._max_recordings:
            self._dropped.add(self._recordings.popitem(last=False)[0])

    def _checked(self, images: Tensor, expected: Predictions, constants: dict[Hashable, object]) -> _Recording | None:
        """Return a recording that reproduces `expected`.

        If that fails, warn, return None and stop recording permanently.
        """
        try:
            recording = self._record(images, constants)
            for tensor in recording.predictions[:3]:
                tensor.fill_(torch.nan)  # so that a graph that writes nothing does not pass the check
            if _agree(self._replay(recording, images), expected):
                return recording
            problem = "its predictions differ"
        except RuntimeError as error:
            problem = str(error)
        self._is_enabled = False
        self._recordings.clear()
        warnings.warn(f"the model cannot be replayed as a CUDA graph ({problem}); running it without one", stacklevel=5)
        return None

    def _record(self, images: Tensor, constants: dict[Hashable, object]) -> _Recording:
        if self._pool is None:
            # The default stream of all captures belongs to the device of the first one in the process.
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        static = images.clone()
        graph = torch.cuda.CUDAGraph()
        # Weights that autocast cached before would no longer exist at the next replay.
        uncached = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        # Other threads may allocate memory meanwhile, for example to pin batches or to post-process results.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with uncached, capture:
            predictions = self._forward(static)
        return _Recording(graph, static, predictions, constants)


def _agree(found: Predictions, expected: Predictions) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True) for a, b in zip(found[:3], expected[:3], strict=True)
    )
