"""Evaluate batches: forward passes, the official post-processing, and an update of the metrics of every task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2f.data_pipeline.categories import TASKS, CategoryTable, Task
from m2f.data_pipeline.sample import DecodedSample
from m2f.data_pipeline.transforms.collate import EvalBatch
from m2f.eval.config import WHOLE_IMAGE, EvaluationConfig, ExtraMetric, TestTime, WholeImage
from m2f.eval.errors import EvaluationError
from m2f.eval.inference.classes import EvaluatedClasses, evaluated_classes
from m2f.eval.inference.image_output import ImageOutput
from m2f.eval.inference.test_time_augmentation import predict_in_passes
from m2f.eval.metrics.error_types import instance_errors, panoptic_errors
from m2f.eval.metrics.extra.task_metric import ScoredImage, task_metrics
from m2f.eval.metrics.instance_matching import InstanceDetections
from m2f.eval.metrics.panoptic_quality import PanopticPrediction
from m2f.eval.metrics.rle import Rle, encode_masks
from m2f.eval.metrics.segment_errors import instance_candidates, panoptic_candidates
from m2f.eval.metrics.truth import instance_truth, panoptic_truth, semantic_truth
from m2f.eval.report.dump import ResultDump, image_file_name
from m2f.eval.report.overlays import instance_overlays, panoptic_overlays, semantic_overlays
from m2f.eval.report.panels import Overlay, render_panel
from m2f.eval.results.states import EvaluationStates
from m2f.model.config import PostprocessConfig
from m2f.model.cpu_products import fast_cpu_products
from m2f.model.errors import ConfigError
from m2f.model.inference.mask_resize import ImageGeometry
from m2f.model.inference.postprocess import panoptic, semantic, stream_instances
from m2f.model.inference.precision import deterministic_convolutions
from m2f.model.inference.result_copies import ResultCopy
from m2f.model.segmenter import Segmenter
from m2f.model.structures import PanopticResult, Predictions

EVALUABLE_TASKS: dict[Task, tuple[Task, ...]] = {
    "panoptic": TASKS,
    "instance": ("instance",),
    "semantic": ("semantic",),
}
"""Tasks on which a model can be evaluated, by the task for which it was trained."""

_MakeOverlays = Callable[[], tuple[Overlay, Overlay]]
"""Function that returns the overlays of truth and prediction of one image, called only if the image is drawn."""


def image_outputs(batch: EvalBatch, predictions: Predictions, layer: int = -1) -> Iterator[ImageOutput]:
    """Yield one layer's output for every image. Raises EvaluationError naming an image whose output is not finite."""
    height, width = batch.images.shape[-2:]
    for row, sample in enumerate(batch.samples):
        resized_height, resized_width = batch.sizes[row].tolist()
        geometry = ImageGeometry((height, width), (resized_height, resized_width), sample.size)
        tensors = (
            predictions.class_logits[layer, row],
            predictions.mask_embeddings[layer, row],
            predictions.mask_features[row],
        )
        check_finite(sample, tensors)
        yield ImageOutput(*tensors, geometry)


def check_finite(sample: DecodedSample, tensors: Iterable[Tensor]) -> None:
    """Raise EvaluationError naming the image if the model's output for it is not finite."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise EvaluationError(
            f"image {sample.image_id} ({sample.source}): the model's output is not finite "
            "because its weights have diverged; evaluate an earlier checkpoint"
        )


def check_tasks(model_task: Task, tasks: Collection[Task]) -> None:
    """Raise ConfigError if a model trained for `model_task` cannot be evaluated on one of `tasks`."""
    unsupported = [task for task in tasks if task not in EVALUABLE_TASKS[model_task]]
    if unsupported or not tasks:
        raise ConfigError(
            f"evaluation.tasks is {list(tasks)}, but a model trained for {model_task!r} can be evaluated on "
            f"{list(EVALUABLE_TASKS[model_task])}; choose from these, or train with data.task=panoptic for all three"
        )


def check_extra_metrics(categories: CategoryTable, metrics: Collection[ExtraMetric]) -> None:
    """Raise ConfigError if one of the metrics does not apply to the classes of the data set."""
    for metric in task_metrics(metrics):
        metric.check_classes(categories)


class Evaluator:
    """Evaluates a model. `model_task` is the task for which the model was trained; it determines the classes.

    If `classes` is an `EvaluatedClasses`, batches must have passed through its `restrict`. If `classes` is a table, the
    model has exactly the classes of the table.

    The truth of all tasks comes from the same sample: a panoptic model gets PQ, AP of its things and mIoU in one pass.
    """

    def __init__(
        self,
        model: Segmenter,
        classes: CategoryTable | EvaluatedClasses,
        config: EvaluationConfig,
        *,
        model_task: Task,
        postprocess: PostprocessConfig,
        test_time: TestTime = WHOLE_IMAGE,
        panel_ids: Collection[int] = (),
        dump: ResultDump | None = None,
    ) -> None:
        if isinstance(classes, CategoryTable):
            classes = evaluated_classes(classes, None, model_task, "the data set")
        categories = classes.categories
        check_tasks(model_task, config.tasks)
        check_extra_metrics(categories, config.extra_metrics)
        self._classes = classes
        self._model = model.eval()
        self._categories = categories
        self._tasks, self._extra_metrics = config.tasks, config.extra_metrics
        self._postprocess = postprocess
        self._test_time, self._shrink = test_time, config.shrink
        self._panel_ids = frozenset(panel_ids)
        self._dump = dump
        self._device = next(model.parameters()).device
        evaluated = categories.for_task(model_task)
        self._is_thing = [c.is_thing for c in evaluated]
        # Maps the evaluated classes to those of the instance task; -1 for stuff, which is never detected.
        self._thing_labels = np.array([categories.labels("instance").get(c.id, -1) for c in evaluated])

    @torch.inference_mode()
    def evaluate_batch(self, batch: EvalBatch) -> EvaluationStates:
        """Return the states of the batch's images for all tasks, with panels of the first task for `panel_ids`."""
        if isinstance(self._test_time, WholeImage):
            return self.score(batch, self.predict(batch))
        states = self._empty_states()
        for sample in batch.samples:
            predict = partial(self._predict_part, sample)
            tasks = self._tasks
            prediction = predict_in_passes(
                sample.image, self._test_time, predict, tasks, self._is_thing, self._postprocess, self._shrink
            )
            pictures: dict[Task, _MakeOverlays] = {}
            if prediction.panoptic is not None:
                pictures["panoptic"] = self._panoptic(sample, prediction.panoptic, states)
            if prediction.instance is not None:
                pictures["instance"] = self._instance(sample, prediction.instance, states)
            if prediction.label_map is not None:
                pictures["semantic"] = self._semantic(sample, prediction.label_map, states)
            self._draw(sample, pictures, states)
        return states

    @torch.inference_mode()
    def predict(self, batch: EvalBatch) -> Predictions:
        """Return the predictions of all layers. Raises EvaluationError if the model has a wrong number of classes."""
        return self._forward(batch.images, batch.sizes)

    def _predict_part(self, sample: DecodedSample, image: Tensor, size: Tensor) -> Predictions:
        """Return the predictions for `image`, which is made from the sample's image."""
        predictions = self._forward(image, size)
        check_finite(sample, predictions[:3])
        return predictions

    def _forward(self, images: Tensor, sizes: Tensor) -> Predictions:
        """Return the predictions of all layers for the evaluated classes."""
        with deterministic_convolutions(), fast_cpu_products(self._device):
            predictions = self._model(self._model.normalise(images.to(self._device), sizes.to(self._device)))
        expected = len(self._classes.model_classes)
        if predictions.class_logits.shape[-1] != expected + 1:
            raise EvaluationError(
                f"the model has {predictions.class_logits.shape[-1] - 1} classes, but {expected} are expected "
                f"for this task; evaluate on a data set with the category table used in training"
            )
        return self._classes.select(predictions)

    @torch.inference_mode()
    def score(self, batch: EvalBatch, predictions: Predictions, layer: int = -1) -> EvaluationStates:
        """Return the states of the batch's images, as `evaluate_batch` does, from one layer of their predictions."""
        states = self._empty_states()
        for sample, output in zip(batch.samples, image_outputs(batch, predictions, layer), strict=True):
            pictures: dict[Task, _MakeOverlays] = {}
            if states.panoptic is not None:
                result = panoptic(*output, self._is_thing, self._postprocess)
                pictures["panoptic"] = self._panoptic(sample, result, states)
            if states.instance is not None:
                detections = detect(output, self._is_thing, self._postprocess)
                pictures["instance"] = self._instance(sample, detections, states)
            if states.semantic is not None:
                labels = semantic(*output, self._postprocess).label_map
                pictures["semantic"] = self._semantic(sample, labels, states)
            self._draw(sample, pictures, states)
        return states

    def _empty_states(self) -> EvaluationStates:
        return EvaluationStates.empty(self._categories, self._tasks, self._extra_metrics)

    def _draw(self, sample: DecodedSample, pictures: Mapping[Task, _MakeOverlays], states: EvaluationStates) -> None:
        """Draw the panel of a sample if its id is in `panel_ids`."""
        if sample.image_id in self._panel_ids:
            first_task = self._tasks[0]
            classes, overlays = self._categories.for_task(first_task), pictures[first_task]()
            states.panels[sample.image_id] = render_panel(sample.image, image_file_name(sample), overlays, classes)

    def _panoptic(self, sample: DecodedSample, result: PanopticResult, states: EvaluationStates) -> _MakeOverlays:
        """Add the panoptic result of one image to dump and states, and return the function that makes its overlays."""
        assert states.panoptic is not None
        copy = ResultCopy(result.segment_map)
        truth = panoptic_truth(sample, self._categories.labels("panoptic"))  # meanwhile
        result = replace(result, segment_map=copy.wait())
        if self._dump is not None:
            self._dump.add_panoptic(sample, result)
        labels = {segment.id: segment.label for segment in result.segments}
        prediction = PanopticPrediction(result.segment_map.numpy(), labels)
        states.panoptic.update(sample.image_id, truth, prediction)
        self._update_extra("panoptic", sample, truth, prediction, states)
        candidates = panoptic_candidates(truth, prediction)
        if states.segments is not None:
            states.segments.update(sample.image_id, candidates)
        if states.errors is not None:
            states.errors.add(sample.image_id, panoptic_errors(candidates))
        scores = {segment.id: segment.score for segment in result.segments}
        return partial(panoptic_overlays, truth, prediction, scores, states.panoptic.image_quality(sample.image_id))

    def _instance(
        self, sample: DecodedSample, detections: InstanceDetections, states: EvaluationStates
    ) -> _MakeOverlays:
        """Add the detections of one image, as `_panoptic` does."""
        assert states.instance is not None
        detections = replace(detections, labels=self._thing_labels[detections.labels])
        if self._dump is not None:
            self._dump.add_instances(sample, detections)
        truth = instance_truth(sample, self._categories.labels("instance"))
        states.instance.update(sample.image_id, truth, detections)
        self._update_extra("instance", sample, truth, detections, states)
        if states.segments is not None and states.panoptic is None:
            states.segments.update(sample.image_id, instance_candidates(truth, detections))
        if states.errors is not None and states.panoptic is None:
            states.errors.add(sample.image_id, instance_errors(truth, detections))
        return partial(instance_overlays, truth, detections, sample.size)

    def _semantic(self, sample: DecodedSample, labels: Tensor, states: EvaluationStates) -> _MakeOverlays:
        """Add the label map of one image, as `_panoptic` does."""
        assert states.semantic is not None
        copy = ResultCopy(labels)
        truth = semantic_truth(sample, self._categories.labels("semantic"))  # meanwhile
        predicted = copy.wait().numpy()
        if self._dump is not None:
            self._dump.add_labels(sample, predicted)
        states.semantic.update(sample.image_id, truth, predicted)
        self._update_extra("semantic", sample, truth, predicted, states)
        return partial(semantic_overlays, truth, predicted, states.semantic.num_classes)

    def _update_extra(
        self, task: Task, sample: DecodedSample, truth: Any, prediction: Any, states: EvaluationStates
    ) -> None:
        """Add truth and prediction of one image to the extra metrics of a task."""
        classes = self._categories.for_task(task)
        image_id = sample.image_id
        image = ScoredImage(image_id=image_id, truth=truth, prediction=prediction, classes=classes, sample=sample)
        states.update_extra(task, image)


def detect(output: ImageOutput, is_thing: Sequence[bool], config: PostprocessConfig) -> InstanceDetections:
    """Return detections of one image, labelled by column of the class logits.

    Masks are encoded group by group, while the device computes the next group.
    """
    masks: list[Rle] = []
    copies: list[ResultCopy] = []

    def encode_first() -> None:
        masks.extend(encode_masks(copies.pop(0).wait().numpy()))

    def consume(group: Tensor) -> None:
        copies.append(ResultCopy(group))
        if len(copies) > 1 or not copies[0].was_needed:  # a group that need not be copied would only take memory
            encode_first()

    ranking = stream_instances(*output, is_thing, config, consume)
    if copies:
        encode_first()
    return InstanceDetections(
        masks=tuple(masks),
        mask_index=ranking.mask_index.cpu().numpy(),
        labels=ranking.labels.cpu().numpy(),
        scores=ranking.scores.cpu().numpy().astype(np.float64),
    )
