"""Predictions for images: pictures to look at and files in the formats that others read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import torch

from cluster.progress import Progress
from cluster.trained_model import TrainedModel
from data_pipeline.categories import Category, Task
from data_pipeline.collate import collate_eval
from data_pipeline.config import DatasetConfig
from data_pipeline.errors import DataError
from data_pipeline.image_file import BrokenImageError, decode_rgb, encode_png, read_header
from data_pipeline.sample import VOID_ID, Annotation, DecodedSample
from eval.inference import check_tasks
from eval.masks import encode_masks
from eval.panels import Scene, SceneSegment, render_panel
from eval.scenes import SHOWN_SCORE
from model.postprocess import ImageGeometry, instance, panoptic, semantic
from model.structures import InstanceResult, PanopticResult, Predictions, SemanticResult

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass
class PredictionFiles:
    """What is written beside the pictures; one entry per image or instance."""

    panoptic: list[dict[str, Any]] = field(default_factory=list)
    """Annotations in COCO panoptic format."""
    instances: list[dict[str, Any]] = field(default_factory=list)
    """COCO results: image_id, category_id, score, segmentation (RLE)."""
    images: list[dict[str, Any]] = field(default_factory=list)
    """Name and id of every image."""


def find_images(paths: Sequence[str]) -> tuple[Path, ...]:
    """The files themselves, and all images in the folders, in order. Raises DataError where there is none."""
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else [path]
        if not inside or not inside[0].exists():
            raise DataError(f"{path}: no such image, or no JPEG or PNG file in this folder")
        found += inside
    return tuple(found)


class Predictor:
    """A trained model at work on one task."""

    def __init__(self, trained: TrainedModel, task: Task) -> None:
        check_tasks(trained.task, [task])
        torch.set_num_threads(trained.evaluation.threads)
        self._trained, self._task, self._model = trained, task, trained.model

    @property
    def classes(self) -> tuple[Category, ...]:
        """By label of the model."""
        return self._trained.classes

    @torch.inference_mode()
    def predict(self, image: np.ndarray) -> PanopticResult | InstanceResult | SemanticResult:
        """Result for an RGB image [H, W, 3] uint8, at its size."""
        settings, device = self._trained.evaluation, next(self._model.parameters()).device
        height, width = image.shape[:2]
        nothing = Annotation(seg=np.full((height, width), VOID_ID, dtype=np.uint8), inst=None, segments=())
        sample = DecodedSample(key="", image_id=0, source="", image=image, annotation=nothing)
        batch = collate_eval([sample], [0], settings.shortest_edge, settings.max_size)
        predictions = self._model(self._model.normalise(batch.images.to(device), batch.sizes.to(device)))
        resized_height, resized_width = batch.sizes[0].tolist()
        padded_height, padded_width = batch.images.shape[-2:]
        geometry = ImageGeometry((padded_height, padded_width), (resized_height, resized_width), (height, width))
        return self._postprocess(predictions, geometry)

    def _postprocess(
        self, predictions: Predictions, geometry: ImageGeometry
    ) -> PanopticResult | InstanceResult | SemanticResult:
        output = (predictions.class_logits[-1, 0], predictions.mask_embeddings[-1, 0], predictions.mask_features[0])
        is_thing = [c.is_thing for c in self.classes]
        match self._task:
            case "panoptic":
                return panoptic(*output, geometry, is_thing, self._trained.config.postprocess)
            case "instance":
                return instance(*output, geometry, is_thing, self._trained.config.postprocess)
            case "semantic":
                return semantic(*output, geometry, self._trained.config.postprocess)
            case _:
                assert_never(self._task)


def predict_images(predictor: Predictor, paths: Sequence[Path], output: Path) -> tuple[str, ...]:
    """Predict every image and write `output`; returns what is wrong with images that cannot be used.

    NAME.overlay.png is the image beside its prediction. Besides: NAME.panoptic.png and panoptic.json (COCO panoptic
    format), instances.json (COCO results), or NAME.labels.png (labels of categories.json), and images.json.
    """
    output.mkdir(parents=True, exist_ok=True)
    names, files, problems = _unique_names(paths), PredictionFiles(), []
    with Progress("predicting", len(paths), "images") as progress:
        for image_id, (path, name) in enumerate(zip(paths, names, strict=True), start=1):
            try:
                image = read_image(path)
            except DataError as error:
                problems.append(str(error))
                progress.note(str(error))
            else:
                files.images.append({"id": image_id, "file_name": str(path), "name": name})
                _write(predictor.predict(image), image, image_id, name, predictor.classes, output, files)
            progress.advance(1)
    _write_json(output / "images.json", files.images)
    categories = [
        {"label": i, "id": c.id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color)}
        for i, c in enumerate(predictor.classes)
    ]
    _write_json(output / "categories.json", categories)
    if files.panoptic:
        content = {"images": files.images, "annotations": files.panoptic, "categories": categories}
        _write_json(output / "panoptic.json", content)
    if files.instances:
        _write_json(output / "instances.json", files.instances)
    return tuple(problems)


def read_image(path: Path, max_pixels: int = DatasetConfig.max_pixels) -> np.ndarray:
    """RGB pixels [H, W, 3] uint8 as a viewer shows them. Raises DataError naming the file."""
    try:
        data = path.read_bytes()
        header = read_header(data)
        if header.height * header.width > max_pixels:
            raise DataError(
                f"{path}: {header.width} x {header.height} pixels are more than {max_pixels}; make it smaller"
            )
        return decode_rgb(data, header.orientation)
    except (OSError, BrokenImageError) as error:
        raise DataError(f"{path}: the image cannot be read: {error}") from error


def _write(
    result: PanopticResult | InstanceResult | SemanticResult,
    image: np.ndarray,
    image_id: int,
    name: str,
    classes: Sequence[Category],
    output: Path,
    files: PredictionFiles,
) -> None:
    match result:
        case PanopticResult():
            scene = _write_panoptic(result, image_id, name, classes, output, files)
        case InstanceResult():
            scene = _collect_instances(result, image_id, image.shape[:2], classes, files)
        case SemanticResult():
            scene = _write_labels(result, name, classes, output)
        case _:
            assert_never(result)
    (output / f"{name}.overlay.png").write_bytes(render_panel(image, name, [scene], classes))


def _write_panoptic(
    result: PanopticResult,
    image_id: int,
    name: str,
    classes: Sequence[Category],
    output: Path,
    files: PredictionFiles,
) -> Scene:
    ids = result.segment_map.cpu().numpy()
    colors = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=-1).astype(np.uint8)
    (output / f"{name}.panoptic.png").write_bytes(encode_png(colors))
    segments = [
        {
            "id": segment.id,
            "category_id": classes[segment.label].id,
            "isthing": int(segment.is_thing),
            "area": segment.area,
            "score": segment.score,
        }
        for segment in result.segments
    ]
    files.panoptic.append({"image_id": image_id, "file_name": f"{name}.panoptic.png", "segments_info": segments})
    return Scene("prediction", ids, {s.id: SceneSegment(s.label, s.score) for s in result.segments})


def _collect_instances(
    result: InstanceResult, image_id: int, size: tuple[int, ...], classes: Sequence[Category], files: PredictionFiles
) -> Scene:
    masks = result.masks.cpu().numpy()
    rles = encode_masks(masks)
    id_map, segments = np.zeros(size, dtype=np.int32), {}
    detections = list(
        enumerate(zip(result.mask_index.tolist(), result.labels.tolist(), result.scores.tolist(), strict=True), start=1)
    )
    for _, (mask, label, score) in detections:
        rle = {"size": list(rles[mask]["size"]), "counts": rles[mask]["counts"].decode("ascii")}
        entry = {"image_id": image_id, "category_id": classes[label].id, "score": score, "segmentation": rle}
        files.instances.append(entry)
    for position, (mask, label, score) in reversed(detections):  # the best one is drawn last, on top
        if score >= SHOWN_SCORE:
            id_map[masks[mask]] = position
            segments[position] = SceneSegment(label, score)
    return Scene("prediction", id_map, segments)


def _write_labels(result: SemanticResult, name: str, classes: Sequence[Category], output: Path) -> Scene:
    labels = result.label_map.cpu().numpy()
    dtype = np.uint8 if len(classes) <= 256 else np.uint16
    (output / f"{name}.labels.png").write_bytes(encode_png(labels.astype(dtype)))
    return Scene("prediction", labels.astype(np.int32) + 1, {i + 1: SceneSegment(i) for i in range(len(classes))})


def _unique_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Stems; images of the same stem get a number."""
    names: list[str] = []
    for path in paths:
        numbered = (f"{path.stem}-{number}" for number in itertools.count(2))
        names.append(next(name for name in itertools.chain([path.stem], numbered) if name not in names))
    return tuple(names)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
