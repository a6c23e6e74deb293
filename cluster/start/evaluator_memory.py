"""Estimate the GPU memory of evaluation actors that share a GPU with a rank, before they start."""

from __future__ import annotations

import math

import torch

from m2f.cluster.recipe.config import RunConfig
from m2f.data_pipeline.transforms.collate import SIZE_MULTIPLE
from m2f.eval.config import EvaluationConfig, MultiScale, SlidingWindows, WholeImage
from m2f.model.analysis.flops.executed import SHAPES_ONLY, build_shapes
from m2f.model.analysis.memory import LiveBytesCounter
from m2f.model.config import ModelConfig
from m2f.trainer.memory.states import CONTEXT_BYTES


def evaluator_bytes(config: RunConfig, model: ModelConfig) -> int:
    """Return the bytes that actors use on each rank's GPU; 0 if they have their own GPUs or none.

    `model.num_classes` must be set.
    """
    cluster, evaluation = config.cluster, config.evaluation
    if not evaluation.sets or not 0 < cluster.gpus_per_worker < 1 or not 0 < evaluation.gpus_per_actor < 1:
        return 0
    actors = math.ceil(evaluation.actors / cluster.max_workers)
    shapes = build_shapes(model)
    weights = sum(t.numel() * t.element_size() for t in (*shapes.parameters(), *shapes.buffers()))
    sizes = [_largest(evaluation.for_set(evaluated)) for evaluated in evaluation.sets]
    height, width = (-(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE for side in max(sizes, key=math.prod))
    with torch.no_grad(), SHAPES_ONLY, LiveBytesCounter() as live:
        shapes(torch.zeros(evaluation.batch_size, 3, height, width)).mask_logits()
    return actors * (weights + live.peak + CONTEXT_BYTES)


def _largest(settings: EvaluationConfig) -> tuple[int, int]:
    """Return height and width in pixels of the largest input of the model with the settings of an evaluation set."""
    match settings.test_time:
        case MultiScale(window=int(size)) | SlidingWindows(size=size):
            return size, size
        case MultiScale(shortest_edges=edges, max_size=longest):
            return max(edges), longest
        case WholeImage(square=square):
            return settings.max_size if square else settings.shortest_edge, settings.max_size
