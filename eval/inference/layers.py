"""Quality of every decoder layer's predictions (Mask2Former, Figure II), and of their masks as proposals (Figure 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.transforms.collate import EvalBatch
from m2f.eval.inference.evaluator import Evaluator, detect, image_outputs
from m2f.eval.inference.image_output import ImageOutput
from m2f.eval.metrics.average_precision import AveragePrecisionState
from m2f.eval.metrics.instance_matching import InstanceDetections, class_agnostic_truth
from m2f.eval.metrics.truth import instance_truth
from m2f.eval.results.results import EvaluationSubject, columns
from m2f.eval.results.states import EvaluationStates
from m2f.model.config import PostprocessConfig
from m2f.model.structures import Predictions

PROPOSALS = (10, 100)
"""Numbers of proposals per image for which recall is measured; the paper uses 100."""
SHOWN_METRICS = ("PQ", "PQ_th", "PQ_st", "AP", "mIoU")
"""Columns of the table, if the evaluated tasks have them."""


@dataclass(frozen=True)
class LayerQuality:
    """Quality of the predictions after one layer."""

    layer: int
    """Layer number; 0 stands for the learnable queries before the decoder, if they are supervised."""
    metrics: dict[str, float | None]
    """SHOWN_METRICS of the evaluated tasks, and AR10 and AR100 of proposals, in per cent; None if undefined."""


class LayerAnalysis:
    """Metric states of every layer, from one forward pass per batch."""

    def __init__(self, evaluator: Evaluator, categories: CategoryTable) -> None:
        self._evaluator, self._categories = evaluator, categories
        self._states: list[EvaluationStates] = []
        self._proposals: list[AveragePrecisionState] = []

    @torch.inference_mode()
    def update(self, batch: EvalBatch) -> None:
        """Evaluate all layers on the images of a batch."""
        predictions = self._evaluator.predict(batch)
        for layer in range(len(predictions.class_logits)):
            states = self._evaluator.score(batch, predictions, layer)
            proposals = self._score_proposals(batch, predictions, layer)
            if layer == len(self._states):
                self._states.append(states)
                self._proposals.append(proposals)
            else:
                self._states[layer].merge(states)
                self._proposals[layer].merge(proposals)

    def compute(self, subject: EvaluationSubject, num_layers: int) -> tuple[LayerQuality, ...]:
        """Return the quality after each of `num_layers` layers, and before the first if the queries are supervised."""
        results, first_layer = [], 1 + num_layers - len(self._states)
        for layer, (states, proposals) in enumerate(zip(self._states, self._proposals, strict=True), first_layer):
            recalls = proposals.compute().stats
            metrics = states.compute(self._categories, subject).metrics()
            metrics = {name: metrics[name] for name in SHOWN_METRICS if name in metrics}
            for name in (f"AR{count}" for count in PROPOSALS):
                metrics[name] = None if recalls[name] < 0 else 100 * recalls[name]
            results.append(LayerQuality(layer, metrics))
        return tuple(results)

    def _score_proposals(self, batch: EvalBatch, predictions: Predictions, layer: int) -> AveragePrecisionState:
        state = AveragePrecisionState(1, PROPOSALS)
        labels = self._categories.labels("instance")
        for sample, output in zip(batch.samples, image_outputs(batch, predictions, layer), strict=True):
            truth = class_agnostic_truth(instance_truth(sample, labels))
            state.update(sample.image_id, truth, class_agnostic_proposals(output))
        return state


def class_agnostic_proposals(output: ImageOutput) -> InstanceDetections:
    """Return the mask of every query as a detection of a single class 0.

    The score is the probability of any class times the mean mask probability inside the mask.
    """
    object_logits = torch.stack([_any_class_logits(output.class_logits), output.class_logits[:, -1].float()], dim=-1)
    config = PostprocessConfig(max_instances=len(object_logits))
    return detect(output._replace(class_logits=object_logits), (True,), config)


def layer_table(layers: tuple[LayerQuality, ...]) -> str:
    """Return a table with one line per layer."""
    names = list(layers[0].metrics)
    return columns(["layer", *names], [[q.layer, *(q.metrics[name] for name in names)] for q in layers])


def _any_class_logits(class_logits: Tensor) -> Tensor:
    """Return logits [Q] whose softmax against "no object" is the total probability of all classes."""
    return class_logits[:, :-1].float().logsumexp(-1)
