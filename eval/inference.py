"""From a batch to metric states: one forward pass, the official post-processing, and every requested task's update."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.categories import TASKS, CategoryTable, Task
from data_pipeline.collate import EvalBatch
from data_pipeline.sample import DecodedSample
from eval.average_precision import AveragePrecisionState, InstanceDetections
from eval.config import EvaluationConfig
from eval.errors import EvaluationError
from eval.masks import Rle, encode_masks
from eval.mean_iou import MeanIoUState
from eval.panels import Scene, render_panel
from eval.panoptic_quality import PanopticPrediction, PanopticQualityState
from eval.result_dump import ResultDump
from eval.scenes import instance_scenes, panoptic_scenes, semantic_scenes
from eval.segment_errors import SegmentErrorState, instance_candidates, panoptic_candidates
from eval.states import EvaluationStates
from eval.truth import instance_truth, panoptic_truth, semantic_truth
from model.config import PostprocessConfig
from model.errors import ConfigError
from model.mask2former import Mask2Former
from model.postprocess import ImageGeometry, panoptic, semantic, stream_instances
from model.structures import Predictions

PREDICTS: dict[Task, tuple[Task, ...]] = {"panoptic": TASKS, "instance": ("instance",), "semantic": ("semantic",)}
"""Tasks that a model trained for a task can be evaluated on."""

_Picture = Callable[[], tuple[Scene, Scene]]
"""Makes truth and prediction of one image ready to be drawn."""


class ImageOutput(NamedTuple):
    """What one layer of the model predicts for one image: the first arguments of the post-processing."""

    class_logits: Tensor
    """[Q, K + 1]"""
    mask_embeddings: Tensor
    """[Q, C]"""
    mask_features: Tensor
    """[C, h, w]"""
    geometry: ImageGeometry


def image_outputs(batch: EvalBatch, predictions: Predictions, layer: int = -1) -> Iterator[ImageOutput]:
    """One layer's predictions, image by image. Raises EvaluationError naming an image whose output is not finite."""
    height, width = batch.images.shape[-2:]
    for row, sample in enumerate(batch.samples):
        resized_height, resized_width = batch.sizes[row].tolist()
        geometry = ImageGeometry((height, width), (resized_height, resized_width), sample.size)
        tensors = (
            predictions.class_logits[layer, row],
            predictions.mask_embeddings[layer, row],
            predictions.mask_features[row],
        )
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise EvaluationError(
                f"image {sample.image_id} ({sample.source}): the model's output is not finite; "
                "its weights have diverged, evaluate an earlier checkpoint"
            )
        yield ImageOutput(*tensors, geometry)


def check_tasks(model_task: Task, tasks: Collection[Task]) -> None:
    """Raises ConfigError if a model trained for `model_task` cannot be evaluated on one of `tasks`."""
    impossible = [task for task in tasks if task not in PREDICTS[model_task]]
    if impossible or not tasks:
        raise ConfigError(
            f"evaluation.tasks is {list(tasks)}, but a model trained for {model_task!r} can be evaluated on "
            f"{list(PREDICTS[model_task])}; choose from these, or train with data.task=panoptic for all three"
        )


class Evaluator:
    """A model and what to measure of it. `model_task` is the task that it was trained for, so the classes it has.

    The truth of every task comes from the same sample: a panoptic model gets PQ, AP of its things and mIoU in one pass.
    """

    def __init__(
        self,
        model: Mask2Former,
        categories: CategoryTable,
        config: EvaluationConfig,
        *,
        model_task: Task,
        postprocess: PostprocessConfig,
        panel_ids: Collection[int] = (),
        dump: ResultDump | None = None,
    ) -> None:
        check_tasks(model_task, config.tasks)
        self._model = model.eval()
        self._categories = categories
        self._tasks = config.tasks
        self._postprocess = postprocess
        self._panel_ids = frozenset(panel_ids)
        self._dump = dump
        self._device = next(model.parameters()).device
        classes = categories.for_task(model_task)
        self._is_thing = [c.is_thing for c in classes]
        # From the model's classes to those of the instance task; -1 for stuff, which is never detected.
        self._thing_labels = np.array([categories.labels("instance").get(c.id, -1) for c in classes])

    @torch.inference_mode()
    def evaluate_batch(self, batch: EvalBatch) -> EvaluationStates:
        """States of the batch's images for all requested tasks, with panels (of the first task) of the chosen ones."""
        return self.score(batch, self.predict(batch))

    @torch.inference_mode()
    def predict(self, batch: EvalBatch) -> Predictions:
        """The model's predictions of all layers. Raises EvaluationError if it has other classes than the data set."""
        images = batch.images.to(self._device)
        # Full precision and fixed algorithms: published numbers must not depend on the GPU that a batch met.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            predictions = self._model(self._model.normalise(images, batch.sizes.to(self._device)))
        if predictions.class_logits.shape[-1] != len(self._is_thing) + 1:
            raise EvaluationError(
                f"the model has {predictions.class_logits.shape[-1] - 1} classes, the data set {len(self._is_thing)} "
                f"for its task; evaluate on a data set with the category table of training"
            )
        return predictions

    @torch.inference_mode()
    def score(self, batch: EvalBatch, predictions: Predictions, layer: int = -1) -> EvaluationStates:
        """States of the batch's images as `evaluate_batch` gives them, from one layer of their predictions."""
        states = EvaluationStates.empty(self._categories, self._tasks)
        for sample, output in zip(batch.samples, image_outputs(batch, predictions, layer), strict=True):
            pictures: dict[Task, _Picture] = {}
            if states.panoptic is not None:
                pictures["panoptic"] = self._panoptic(sample, output, states.panoptic, states.segments)
            if states.instance is not None:
                segments = states.segments if states.panoptic is None else None
                pictures["instance"] = self._instance(sample, output, states.instance, segments)
            if states.semantic is not None:
                pictures["semantic"] = self._semantic(sample, output, states.semantic)
            if sample.image_id in self._panel_ids:
                shown = self._tasks[0]
                classes, scenes = self._categories.for_task(shown), pictures[shown]()
                states.panels[sample.image_id] = render_panel(sample.image, f"image {sample.image_id}", scenes, classes)
        return states

    def _panoptic(
        self,
        sample: DecodedSample,
        output: ImageOutput,
        state: PanopticQualityState,
        segments: SegmentErrorState | None,
    ) -> _Picture:
        result = panoptic(*output, self._is_thing, self._postprocess)
        if self._dump is not None:
            self._dump.add_panoptic(sample, result)
        truth = panoptic_truth(sample, self._categories.labels("panoptic"))
        labels = {segment.id: segment.label for segment in result.segments}
        prediction = PanopticPrediction(result.segment_map.cpu().numpy(), labels)
        state.update(sample.image_id, truth, prediction)
        if segments is not None:
            segments.update(sample.image_id, panoptic_candidates(truth, prediction))
        scores = {segment.id: segment.score for segment in result.segments}
        return partial(panoptic_scenes, truth, prediction, scores, state.image_quality(sample.image_id))

    def _instance(
        self,
        sample: DecodedSample,
        output: ImageOutput,
        state: AveragePrecisionState,
        segments: SegmentErrorState | None,
    ) -> _Picture:
        detections = detect(output, self._is_thing, self._postprocess)
        detections = replace(detections, labels=self._thing_labels[detections.labels])
        if self._dump is not None:
            self._dump.add_instances(sample, detections)
        truth = instance_truth(sample, self._categories.labels("instance"))
        state.update(sample.image_id, truth, detections)
        if segments is not None:
            segments.update(sample.image_id, instance_candidates(truth, detections))
        return partial(instance_scenes, truth, detections, sample.size)

    def _semantic(self, sample: DecodedSample, output: ImageOutput, state: MeanIoUState) -> _Picture:
        predicted = semantic(*output, self._postprocess).label_map.cpu().numpy()
        if self._dump is not None:
            self._dump.add_labels(sample, predicted)
        truth = semantic_truth(sample, self._categories.labels("semantic"))
        state.update(sample.image_id, truth, predicted)
        return partial(semantic_scenes, truth, predicted, state.num_classes)


def detect(output: ImageOutput, is_thing: Sequence[bool], config: PostprocessConfig) -> InstanceDetections:
    """Detections of one image, labelled with the model's classes. Masks are encoded as they come, a few at a time."""
    masks: list[Rle] = []
    ranking = stream_instances(
        *output, is_thing, config, take=lambda group: masks.extend(encode_masks(group.cpu().numpy()))
    )
    return InstanceDetections(
        masks=tuple(masks),
        mask_index=ranking.mask_index.cpu().numpy(),
        labels=ranking.labels.cpu().numpy(),
        scores=ranking.scores.cpu().numpy().astype(np.float64),
    )
