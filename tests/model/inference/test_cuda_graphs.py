"""Bookkeeping of recorded forward passes, with fake CUDA graphs whose replay recomputes the captured outputs."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from m2f.model.constants import cache_constants
from m2f.model.inference.cuda_graphs import ReplayedForward, replay_forward
from m2f.model.structures import Predictions


class Model:
    """Fake model that doubles its images and counts its forward passes."""

    def __init__(self):
        self.runs, self.captured = 0, None

    def __call__(self, images):
        self.runs += 1
        predictions = Predictions(images[:, :1] * 2, images * 2, images + 1)
        if self.captured is not None:
            self.captured.append((images, predictions))
        return predictions


class Gpu:
    """Fake of torch.cuda. Forward passes inside `torch.cuda.graph` are recorded by the model.

    A replay writes the class logits with an error of `error`.
    """

    def __init__(self, model, monkeypatch, error=0.0):
        self.model, self.error, self.graphs = model, error, []
        self.is_selected, self.uses, self.order = False, [], []
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self.new_graph)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self.use("stream"))
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self))
        monkeypatch.setattr(torch.cuda, "device_of", self.device_of)
        monkeypatch.setattr("torch.autocast", lambda *a, **k: torch.inference_mode())

    def new_graph(self):
        self.graphs.append(Graph(self))
        return self.graphs[-1]

    @contextmanager
    def device_of(self, images):
        self.is_selected = True
        yield
        self.is_selected = False

    def use(self, name):
        """Note whether the device of the images is the current one."""
        self.uses.append((name, self.is_selected))
        return name

    @contextmanager
    def capture(self, graph, pool, stream, capture_error_mode):
        assert (pool, stream) == ("pool", "stream")
        assert capture_error_mode == "thread_local"  # other threads may allocate memory
        self.use("record")
        self.model.captured = graph.captured
        yield
        self.model.captured = None


class Event:
    """Notes in the GPU's order when a stream records it or waits for it."""

    def __init__(self, gpu):
        self.gpu = gpu

    def wait(self):
        self.gpu.order.append("wait")

    def record(self):
        self.gpu.order.append("record")


class Graph:
    def __init__(self, gpu):
        self.gpu, self.captured, self.replays = gpu, [], 0

    def replay(self):
        self.gpu.use("replay")
        self.gpu.order.append("replay")
        self.replays += 1
        for images, predictions in self.captured:
            predictions.class_logits.copy_(images[:, :1] * 2 + self.gpu.error)
            predictions.mask_embeddings.copy_(images * 2)
            predictions.mask_features.copy_(images + 1)


def images(value, size=4):
    return torch.full((1, 3, size, size), float(value))


def assert_correct(predictions, value):
    assert predictions.class_logits.unique().item() == 2 * value
    assert predictions.mask_embeddings.unique().item() == 2 * value
    assert predictions.mask_features.unique().item() == value + 1


def test_the_second_image_of_a_size_records_and_later_ones_replay(monkeypatch):
    model = Model()
    gpu = Gpu(model, monkeypatch)
    forward = ReplayedForward(model)
    kept = [forward(images(value)) for value in range(1, 6)]
    assert model.runs == 3  # two direct passes and one recording
    assert [graph.replays for graph in gpu.graphs] == [4]  # checked once, then images 3 to 5
    for value, predictions in enumerate(kept, start=1):
        assert_correct(predictions, value)  # later replays do not overwrite earlier results
    assert_correct(forward(images(7, size=8)), 7)
    assert model.runs == 4
    assert len(gpu.graphs) == 1


def test_only_the_most_recently_used_sizes_are_kept(monkeypatch):
    model = Model()
    gpu = Gpu(model, monkeypatch)
    forward = ReplayedForward(model, max_recordings=2)
    for size in (4, 4, 8, 8, 4, 12, 12):  # 12 replaces 8
        forward(images(1, size))
    assert len(gpu.graphs) == 3
    runs = model.runs
    forward(images(2, 4))
    assert model.runs == runs
    assert_correct(forward(images(3, 8)), 3)
    assert model.runs == runs + 1


def test_sizes_seen_once_do_not_replace_recordings(monkeypatch):
    model = Model()
    gpu = Gpu(model, monkeypatch)
    forward = ReplayedForward(model, max_recordings=1)
    for size in (4, 4, 5, 6, 7, 8):
        forward(images(1, size))
    runs = model.runs
    assert_correct(forward(images(3, 4)), 3)
    assert model.runs == runs
    assert len(gpu.graphs) == 1


def test_a_replay_waits_for_the_copies_of_the_one_before(monkeypatch):
    """Threads may use different streams, which share the recording's input and output."""
    model = Model()
    gpu = Gpu(model, monkeypatch)
    forward = ReplayedForward(model)
    for value in (1, 2, 3, 4):
        forward(images(value))
    assert gpu.order == ["replay", "record", "wait", "replay", "record", "wait", "replay", "record"]


def test_size_whose_recording_was_dropped_is_not_recorded_again(monkeypatch):
    model = Model()
    gpu = Gpu(model, monkeypatch)
    forward = ReplayedForward(model, max_recordings=1)
    for value, size in enumerate((4, 4, 8, 8, 4, 4, 4, 8)):
        assert_correct(forward(images(value, size)), value)
    assert len(gpu.graphs) == 2


def test_threads_do_not_overwrite_the_input_of_a_replay(monkeypatch):
    model, in_replay = Model(), threading.Event()
    Gpu(model, monkeypatch)
    forward = ReplayedForward(model)
    for value in (1, 2):
        forward(images(value))
    replay = Graph.replay

    def slow_replay(graph):
        monkeypatch.setattr(Graph, "replay", replay)
        in_replay.set()
        second.join(0.2)  # without the lock, the second thread would finish here
        replay(graph)

    monkeypatch.setattr(Graph, "replay", slow_replay)
    second = threading.Thread(target=lambda: in_replay.wait() and forward(images(5)))
    second.start()
    assert_correct(forward(images(3)), 3)
    second.join()


def test_recording_with_wrong_predictions_is_not_used(monkeypatch):
    model = Model()
    Gpu(model, monkeypatch, error=0.5)
    forward = ReplayedForward(model)
    forward(images(1))
    with pytest.warns(UserWarning, match=r"cannot be replayed .* \(its predictions differ\); running it without one"):
        assert_correct(forward(images(2)), 2)
    for value in (3, 4):
        assert_correct(forward(images(value)), value)


def test_recording_and_replay_use_the_device_of_the_images(monkeypatch):
    model = Model()
    gpu = Gpu(model, monkeypatch)
    forward = ReplayedForward(model)
    for value in (1, 2, 3):
        forward(images(value))
    assert gpu.uses == [("stream", True), ("record", True), ("replay", True), ("replay", True)]


def test_recording_owns_the_constants_of_its_model(monkeypatch):
    ones = cache_constants(1)(lambda length: torch.ones(length))
    model = Model()
    gpu = Gpu(model, monkeypatch)
    forward = ReplayedForward(lambda images: model(images * ones(images.shape[-1])))
    for size in (4, 4, 8):
        forward(images(1, size))
    (recording,) = forward._recordings.values()
    assert [constant.tolist() for constant in recording.constants.values()] == [[1.0] * 4]
    assert len(gpu.graphs) == 1


def test_graph_that_records_nothing_is_not_used(monkeypatch):
    """Then its outputs still hold the predictions for the image with which it was recorded."""
    model = Model()
    gpu = Gpu(model, monkeypatch)
    monkeypatch.setattr(Graph, "replay", lambda graph: gpu.use("replay"))
    forward = ReplayedForward(model)
    forward(images(1))
    with pytest.warns(UserWarning, match="its predictions differ"):
        assert_correct(forward(images(2)), 2)
    assert_correct(forward(images(3)), 3)


def test_model_that_cannot_be_captured_runs_without_graphs(monkeypatch):
    model = Model()
    Gpu(model, monkeypatch)

    def refuse(graph, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    forward = ReplayedForward(model)
    forward(images(1))
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        assert_correct(forward(images(2)), 2)
    assert_correct(forward(images(3)), 3)


def test_model_on_a_cpu_is_left_unchanged():
    model = nn.Linear(2, 2)
    replay_forward(model)
    assert "forward" not in vars(model)


def test_a_replayed_model_is_freed_with_its_last_reference():
    class OnGpu:
        def parameters(self):
            yield SimpleNamespace(device=torch.device("cuda"))

        def forward(self, images):
            return images

    model = OnGpu()
    replay_forward(model)  # type: ignore[arg-type]
    assert isinstance(model.forward, ReplayedForward)
    assert model.forward._forward(1) == 1
    freed = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert freed() is None
    finally:
        gc.enable()
