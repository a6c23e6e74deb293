"""The paper's analyses of a trained model: quality by decoder layer, and share of attention on objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from m2f.cluster.evaluation.weights import model_classes, model_with_weights
from m2f.cluster.predict.choose_checkpoint import ChosenWeights
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.terminal import Progress
from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.loading.loader import eval_batches, eval_groups
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.preview import spread_indices
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.collate import EvalBatch
from m2f.eval.inference.attention import AttentionMass, MatchedObjects, attention_pictures, matched_objects
from m2f.eval.inference.classes import EvaluatedClasses, evaluated_classes
from m2f.eval.inference.evaluator import EVALUABLE_TASKS, Evaluator
from m2f.eval.inference.layers import LayerAnalysis, LayerQuality
from m2f.eval.report.panels import render_heat_maps
from m2f.eval.results.results import EvaluationSubject
from m2f.model.analysis.attention_maps import AttentionMap, recorded_attention
from m2f.model.format_count import format_count
from m2f.model.segmenter import Segmenter
from m2f.trainer.checkpoint.weights import weights_url


@dataclass(frozen=True)
class AnalysisSubject:
    """A trained model and the images to analyse."""

    config: RunConfig
    model: Segmenter
    dataset: str
    manifest: Manifest
    classes: EvaluatedClasses
    indices: tuple[int, ...]
    """Positions of the images in the manifest."""
    storage: Storage
    step: int | None
    """Optimizer step of the checkpoint; None for other weights."""

    @property
    def title(self) -> str:
        """Title with data set, number of images and checkpoint; a second line if only some classes are evaluated."""
        weights = "weights" if self.step is None else f"checkpoint of step {self.step}"
        title = f"{self.dataset}: {len(self.indices)} of {format_count(self.manifest.num_samples, 'image')}, {weights}"
        return title if self.classes.note is None else f"{title}\nSOME CLASSES: {self.classes.note}"


def open_subject(
    config: RunConfig, weights: ChosenWeights, dataset: str, num_images: int, storage: Storage
) -> AnalysisSubject:
    """Load the model and choose up to `num_images` images, spread evenly over the data set.

    Raises DataError if the shards are missing or damaged, or their classes contradict those of the model.
    """
    torch.set_num_threads(config.evaluation.threads)
    manifest, url = Manifest.load(config.datasets[dataset].shards, storage), weights_url(weights.url, storage)
    known_classes = model_classes(config, url, storage)
    classes = evaluated_classes(manifest.categories, known_classes, config.data.task, dataset)
    model = model_with_weights(replace(config.model, num_classes=len(classes.model_classes)), url, storage)
    indices = spread_indices(manifest, num_images)
    return AnalysisSubject(config, model, dataset, manifest, classes, indices, storage, weights.step)


def analyze_layers(subject: AnalysisSubject) -> tuple[LayerQuality, ...]:
    """Return the metrics of the predictions after every decoder layer, for all tasks that the model supports.

    If the initial queries are supervised, the first entry is that of the predictions before the first layer.
    """
    config, categories = subject.config, subject.classes.categories
    evaluator = Evaluator(
        subject.model,
        subject.classes,
        replace(config.evaluation, tasks=EVALUABLE_TASKS[config.data.task]),
        model_task=config.data.task,
        postprocess=config.model.postprocess,
    )
    analysis = LayerAnalysis(evaluator, categories)
    for batch in _batches(subject):
        analysis.update(batch)
    fingerprint = subject.manifest.fingerprint
    evaluation_subject = EvaluationSubject(dataset=subject.dataset, fingerprint=fingerprint, step=subject.step)
    return analysis.compute(evaluation_subject, config.model.transformer_decoder.num_layers)


def analyze_attention(subject: AnalysisSubject, num_pictures: int) -> tuple[AttentionMass, dict[int, bytes]]:
    """Measure how attention is divided between matched objects and the rest of the image.

    Also return PNG pictures by image id, for the first `num_pictures` images with a matched object. Each shows the
    attention maps of the matched query with the highest score; things take precedence over stuff.
    """
    config, categories = subject.config, subject.classes.categories
    labels = categories.labels(config.data.task)
    classes = categories.for_task(config.data.task)
    mass, pictures = AttentionMass(), {}
    device = next(subject.model.parameters()).device
    for batch in _batches(subject):
        with torch.inference_mode(), recorded_attention(subject.model) as maps:
            predictions = subject.model(subject.model.normalise(batch.images.to(device), batch.sizes.to(device)))
        predictions = subject.classes.select(predictions)
        for index, sample in enumerate(batch.samples):
            objects = matched_objects(batch, index, predictions, config.data.task, labels, config.model.loss)
            mass.update(maps, index, objects)
            if len(objects.queries) and len(pictures) < num_pictures:
                scores = predictions.class_logits[-1, index].softmax(-1).cpu()[objects.queries, objects.labels]
                pictures[sample.image_id] = _attention_picture(batch, index, maps, objects, scores, classes)
    return mass, pictures


def _attention_picture(
    batch: EvalBatch,
    index: int,
    maps: Sequence[AttentionMap],
    objects: MatchedObjects,
    scores: torch.Tensor,
    classes: Sequence[Category],
) -> bytes:
    """Return a PNG of the image with the outline of one object and the attention maps of its query.

    The object is the matched thing with the highest score, or the best stuff segment if no thing is matched.
    """
    things = torch.tensor([classes[label].is_thing for label in objects.labels.tolist()])
    best = int((scores + things).argmax())
    height, width = batch.sizes[index].tolist()
    image = np.ascontiguousarray(batch.images[index, :, :height, :width].permute(1, 2, 0).numpy())
    name = classes[int(objects.labels[best])].name
    title = f"image {batch.samples[index].image_id}: {name} {100 * scores[best]:.0f}"
    heats = attention_pictures(maps, index, int(objects.queries[best]), (height, width))
    return render_heat_maps(image, objects.masks[best, :height, :width].numpy(), title, heats)


def _batches(subject: AnalysisSubject) -> Iterator[EvalBatch]:
    settings = subject.config.evaluation
    with Progress("analysing", len(subject.indices), "images") as progress:
        manifest, square = subject.manifest, settings.pads_to_squares
        limits = {"shortest_edge": settings.shortest_edge, "max_size": settings.max_size}
        groups = eval_groups(manifest, subject.indices, batch_size=settings.batch_size, square=square, **limits)
        for batch in eval_batches(manifest, groups, subject.storage, shrink=settings.shrink, square=square, **limits):
            yield subject.classes.restrict(batch)
            progress.advance(len(batch.samples))
