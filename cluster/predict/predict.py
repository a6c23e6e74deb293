"""Predict with a trained model on images without annotations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from m2f.cluster.predict.files import Prediction, PredictionFolder
from m2f.cluster.predict.inputs import ImageInput, read_images
from m2f.cluster.predict.trained_model import TrainedModel
from m2f.cluster.terminal import Progress
from m2f.data_pipeline.categories import Category, Task
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.sample import VOID_ID, Annotation, DecodedSample
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.collate import collate_eval, padded_eval_size
from m2f.eval.config import MultiScale, SlidingWindows, WholeImage, check_test_time
from m2f.eval.inference.evaluator import check_finite, check_tasks, detect, image_outputs
from m2f.eval.inference.image_output import ImageOutput
from m2f.eval.inference.test_time_augmentation import predict_in_passes
from m2f.eval.metrics.average_precision import InstanceDetections
from m2f.model.cpu_products import fast_cpu_products
from m2f.model.errors import ConfigError
from m2f.model.inference.cuda_graphs import replay_forward
from m2f.model.inference.postprocess import panoptic, semantic
from m2f.model.inference.precision import deterministic_convolutions, set_precision
from m2f.model.inference.result_copies import ResultCopy
from m2f.model.structures import PanopticResult, Predictions, SemanticResult

MAX_WAITING_BATCHES = 4
"""Images wait for others of equal input size. If this many batches of images wait, the largest group is predicted."""


@dataclass(frozen=True)
class LoadedImage:
    """An image with its pixels [H, W, 3] uint8 RGB."""

    image: ImageInput
    pixels: np.ndarray


class Predictor:
    """Predicts one task with a trained model.

    Args:
        trained: the model, with the settings of its recipe.
        task: "panoptic", "instance" or "semantic".
        min_score: lowest score, from 0 to 1, of segments (replaces the recipe's `object_threshold`), detections and
            labelled pixels. None: the recipe's threshold for segments, and no threshold for detections and pixels.

    Raises:
        ConfigError: the model or the test-time settings do not support the task, or `min_score` is invalid.
    """

    def __init__(self, trained: TrainedModel, task: Task, min_score: float | None = None) -> None:
        check_tasks(trained.task, [task])
        test_time = trained.evaluation.test_time
        check_test_time(test_time, [task], "evaluation")
        if min_score is not None and not 0 <= min_score <= 1:
            raise ConfigError(f"--min-score is {min_score}; it must be from 0 to 1")
        if min_score is not None and task == "semantic" and not isinstance(test_time, WholeImage):
            raise ConfigError(
                f"--min-score is {min_score}, which evaluation.test_time.kind={test_time.kind} does not support for "
                "--task semantic; omit it, or set evaluation.test_time.kind=whole"
            )
        self._trained, self._task, self._model, self._min_score = trained, task, trained.model, min_score
        self._postprocess = trained.config.postprocess
        if min_score is not None:
            self._postprocess = replace(self._postprocess, object_threshold=min_score)

    @property
    def classes(self) -> tuple[Category, ...]:
        """Classes of the model, by label."""
        return self._trained.classes

    def input_size(self, pixels: np.ndarray) -> tuple[int, int]:
        """Return the height and width in pixels of the model's input for an image that is alone in its batch.

        Images with equal input sizes can share a batch without additional padding.
        """
        settings = self._trained.evaluation
        height, width = pixels.shape[:2]
        return padded_eval_size((height, width), settings.shortest_edge, settings.max_size, settings.pads_to_squares)

    def predict(self, images: Sequence[LoadedImage]) -> Iterator[Prediction]:
        """Predict a batch of images and yield the predictions at the sizes of the images.

        Raises EvaluationError, which names the image, if an output is not finite.
        """
        for found in self.predict_tasks(images, (self._task,)):
            yield found[self._task]

    @torch.inference_mode()
    def predict_tasks(self, images: Sequence[LoadedImage], tasks: Sequence[Task]) -> Iterator[dict[Task, Prediction]]:
        """Predict several tasks with one forward pass, and yield for each image its predictions by task.

        Raises ConfigError if the model does not support a task.
        """
        settings = self._trained.evaluation
        check_tasks(self._trained.task, tasks)
        check_test_time(settings.test_time, tasks, "evaluation")
        samples = [_without_annotation(image) for image in images]
        if not isinstance(settings.test_time, WholeImage):
            for sample in samples:
                found = self._predict_in_passes(sample, settings.test_time, tasks)
                yield _on_host(found.items())
            return
        batch = collate_eval(
            samples,
            range(len(samples)),
            settings.shortest_edge,
            settings.max_size,
            settings.shrink,
            settings.pads_to_squares,
        )
        for output in image_outputs(batch, self._forward(batch.images, batch.sizes)):
            yield _on_host((task, self._postprocess_output(output, task)) for task in tasks)

    def _forward(self, images: Tensor, sizes: Tensor) -> Predictions:
        device = next(self._model.parameters()).device
        with deterministic_convolutions(), fast_cpu_products(device):  # as in evaluation
            return self._model(self._model.normalise(images.to(device), sizes.to(device)))

    def _predict_in_passes(
        self, sample: DecodedSample, test_time: MultiScale | SlidingWindows, tasks: Sequence[Task]
    ) -> dict[Task, Prediction]:
        def predict(images: Tensor, sizes: Tensor) -> Predictions:
            predictions = self._forward(images, sizes)
            check_finite(sample, predictions[:3])
            return predictions

        is_thing, shrink = [c.is_thing for c in self.classes], self._trained.evaluation.shrink
        found = predict_in_passes(sample.image, test_time, predict, tasks, is_thing, self._postprocess, shrink)
        by_task: dict[Task, Prediction] = {}
        if found.panoptic is not None:
            by_task["panoptic"] = found.panoptic
        if found.instance is not None:
            by_task["instance"] = _filter_by_score(found.instance, self._min_score)
        if found.label_map is not None:
            by_task["semantic"] = SemanticResult(found.label_map)
        return by_task

    def _postprocess_output(self, output: ImageOutput, task: Task) -> Prediction:
        is_thing = [c.is_thing for c in self.classes]
        match task:
            case "panoptic":
                return panoptic(*output, is_thing, self._postprocess)
            case "instance":
                return _filter_by_score(detect(output, is_thing, self._postprocess), self._min_score)
            case "semantic":
                return semantic(*output, self._postprocess, self._min_score)
            case _:
                assert_never(task)


def _on_host(predictions: Iterable[tuple[Task, Prediction]]) -> dict[Task, Prediction]:
    """Return predictions by task, in host memory. Each is copied while the device computes the next one."""
    copies = {task: _start_copy(prediction) for task, prediction in predictions}
    return {task: wait() for task, wait in copies.items()}


def _start_copy(prediction: Prediction) -> Callable[[], Prediction]:
    """Start copying a prediction to the host, and return a function that waits for the copy and returns it."""
    match prediction:
        case PanopticResult():
            segments = ResultCopy(prediction.segment_map)
            return lambda: replace(prediction, segment_map=segments.wait())
        case SemanticResult():
            labels = ResultCopy(prediction.label_map)
            return lambda: SemanticResult(labels.wait())
        case InstanceDetections():
            return lambda: prediction
        case _:
            assert_never(prediction)


def prepare_model(trained: TrainedModel) -> None:
    """Apply the recipe's precision and CUDA graphs to the model. Call this once per model."""
    set_precision(trained.model, trained.evaluation.precision)
    if trained.evaluation.cuda_graphs:
        replay_forward(trained.model)


def prepare_process(trained: TrainedModel) -> None:
    """Set the recipe's number of threads for this process and call `prepare_model`."""
    torch.set_num_threads(trained.evaluation.threads)
    prepare_model(trained)


def predict_images(
    predictor: Predictor, images: Sequence[ImageInput], storage: Storage, folder: PredictionFolder, batch_size: int
) -> tuple[str, ...]:
    """Write the predictions of all images to a folder; return an error message for each image that cannot be used."""
    problems: list[str] = []
    with Progress("predicting", len(images), "images") as progress:

        def readable_images() -> Iterator[LoadedImage]:
            for image, pixels in read_images(images, storage):
                if isinstance(pixels, DataError):
                    problems.append(str(pixels))
                    progress.note(str(pixels))
                    progress.advance(1)
                else:
                    yield LoadedImage(image, pixels)

        for batch in batches_by_shape(readable_images(), predictor, batch_size):
            for loaded, prediction in zip(batch, predictor.predict(batch), strict=True):
                folder.add(loaded.image, loaded.pixels, prediction)
                progress.advance(1)
    return tuple(problems)


def batches_by_shape(
    images: Iterable[LoadedImage], predictor: Predictor, batch_size: int
) -> Iterator[list[LoadedImage]]:
    """Yield batches of images with equal input sizes, so that no image gets more padding than it would have alone."""
    groups: dict[tuple[int, int], list[LoadedImage]] = {}
    for image in images:
        group = groups.setdefault(predictor.input_size(image.pixels), [])
        group.append(image)
        if len(group) == batch_size:
            yield groups.pop(predictor.input_size(image.pixels))
        elif sum(map(len, groups.values())) >= MAX_WAITING_BATCHES * batch_size:
            yield groups.pop(max(groups, key=lambda size: len(groups[size])))
    yield from groups.values()


def _without_annotation(loaded: LoadedImage) -> DecodedSample:
    empty = Annotation(seg=np.full(loaded.pixels.shape[:2], VOID_ID, dtype=np.uint8), inst=None, segments=())
    image = loaded.image
    return DecodedSample(key="", image_id=image.id, source=image.url, image=loaded.pixels, annotation=empty)


def _filter_by_score(detections: InstanceDetections, min_score: float | None) -> InstanceDetections:
    if min_score is None:
        return detections
    is_kept = detections.scores >= min_score
    columns = {name: getattr(detections, name)[is_kept] for name in ("mask_index", "labels", "scores")}
    return replace(detections, **columns)
