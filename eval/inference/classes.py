"""Reduce a model and a data set to the classes that both have, in the data set's order.

Logits are reordered to the classes of the data set, and annotations of classes that the model lacks are removed. Both
happen before any metric, so metrics, dumps and pictures use a single table.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from m2f.data_pipeline.categories import Category, CategoryTable, Task
from m2f.data_pipeline.label_space import describe_subset, require_match
from m2f.data_pipeline.sample import VOID_ID, Annotation, DecodedSample
from m2f.data_pipeline.transforms.collate import EvalBatch
from m2f.model.structures import Predictions


@dataclass(frozen=True)
class EvaluatedClasses:
    """Classes that a model and a data set have in common."""

    categories: CategoryTable
    """Categories of the data set, without the classes that the model lacks."""
    columns: tuple[int, ...] | None
    """Model label of every evaluated class; None if the model has exactly these classes in this order."""
    model_classes: tuple[Category, ...]
    """All classes of the model, by label."""
    note: str | None = None
    """One line that states what is left out; None if both have the same classes."""

    def select(self, predictions: Predictions) -> Predictions:
        """Return predictions with one logit per evaluated class; all other classes are merged into "no object".

        The probabilities of the evaluated classes are unchanged.
        """
        if self.columns is None:
            return predictions
        return predictions._replace(class_logits=select_columns(predictions.class_logits, self.columns))

    def restrict(self, batch: EvalBatch) -> EvalBatch:
        """Return the batch without annotations of classes that the model lacks; their pixels in `seg` become void."""
        known_ids = self.categories.by_id.keys()
        if all(s.category_id in known_ids for sample in batch.samples for s in sample.annotation.segments):
            return batch
        return replace(batch, samples=tuple(_restricted(sample, known_ids) for sample in batch.samples))


def evaluated_classes(
    table: CategoryTable, model_classes: Sequence[Category] | None, task: Task, data_name: str
) -> EvaluatedClasses:
    """Match a data set's table with the classes of a model for `task`.

    `model_classes` None means that the model has the classes of the data set. Raises DataError if the tables contradict
    each other or share no class; the message shows the rows that differ.
    """
    data_classes = table.for_task(task)
    if model_classes is None:
        return EvaluatedClasses(table, None, data_classes)
    names = {category.name for category in model_classes}
    # In the instance task, stuff is not a class, but stuff with the name of a thing of the model is a contradiction.
    compared = tuple(c for c in table.categories if c in data_classes or c.name in names)
    matched = require_match(model_classes, compared, "the model", data_name)
    if matched.labels == tuple(range(len(data_classes))):
        return EvaluatedClasses(table, None, tuple(model_classes))
    label_of = {category.name: label for label, category in enumerate(model_classes)}
    kept = CategoryTable(tuple(c for c in table.categories if c.name in label_of or c not in data_classes))
    columns = tuple(label_of[category.name] for category in kept.for_task(task))
    note = describe_subset(matched, "the model", data_name)
    return EvaluatedClasses(kept, columns, tuple(model_classes), note)


def select_columns(class_logits: Tensor, columns: Sequence[int]) -> Tensor:
    """Convert logits [..., K + 1] to [..., len(columns) + 1] of the given classes, with "no object" last."""
    other_labels = [label for label in range(class_logits.shape[-1]) if label not in set(columns)]
    no_object = (
        class_logits[..., other_labels[-1:]]
        if len(other_labels) == 1
        else class_logits[..., other_labels].logsumexp(-1, keepdim=True)
    )
    return torch.cat([class_logits[..., list(columns)], no_object], dim=-1)


def _restricted(sample: DecodedSample, known_ids: Collection[int]) -> DecodedSample:
    annotation = sample.annotation
    kept_segments = tuple(s for s in annotation.segments if s.category_id in known_ids)
    seg = annotation.seg
    if seg is not None:
        removed_ids = [s.id for s in annotation.segments if s.map == "seg" and s.category_id not in known_ids]
        seg = np.where(np.isin(seg, removed_ids), seg.dtype.type(VOID_ID), seg)
    return replace(sample, annotation=Annotation(seg=seg, inst=annotation.inst, segments=kept_segments))
