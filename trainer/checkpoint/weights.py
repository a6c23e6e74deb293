"""Weights from a checkpoint or elsewhere: their location, integrity and identity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from m2f.data_pipeline.documents import DocumentError, parse_yaml
from m2f.data_pipeline.label_space import match_classes, require_match
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.config import BackboneConfig, ModelConfig
from m2f.model.errors import WeightsError
from m2f.model.export.hugging_face import is_hugging_face_folder, known_labels, read_hugging_face_config
from m2f.model.weights.architecture import require_same_architecture, require_stored_architecture
from m2f.model.weights.files import frozen_file, weights_files, weights_sha256
from m2f.model.weights.hub import hub_folder
from m2f.model.weights.packages import weights_path
from m2f.model.weights.sources import HUB, PACKAGE, is_file
from m2f.trainer.checkpoint.folder import AVERAGE, MANIFEST, WEIGHTS, file_entry, is_frozen, read_manifest
from m2f.trainer.checkpoint.identity import IDENTITY, METADATA_KEY, ModelIdentity, StartWeights, read_metadata
from m2f.trainer.errors import CheckpointError


def weights_url(checkpoint: str, storage: Storage) -> str:
    """Return the weights file of a checkpoint folder, preferably the moving average; other paths are unchanged."""
    if is_file(checkpoint):
        return checkpoint
    found = (url for name in (AVERAGE, WEIGHTS) if storage.exists(url := join(checkpoint, name)))
    return next(found, checkpoint)


def manifest_sha256(weights: str, storage: Storage) -> str | None:
    """Return the SHA-256 of a checkpoint's weights from its manifest; None if no manifest lists them."""
    folder, _, name = weights.rpartition("/")
    if name not in (AVERAGE, WEIGHTS) or not storage.exists(join(folder, MANIFEST)):
        return None
    entry = read_manifest(storage, folder).files.get(name)
    return None if entry is None else entry.sha256


def resolve_start_weights(weights: str, storage: Storage) -> str:
    """Return the path that a value of `model.weights` or `model.backbone.weights` refers to.

    For a checkpoint folder, this is the file of its weights, not of their moving average. For a model of the hub, it is
    the cache folder, to which the model is downloaded if necessary. Other values are returned unchanged.
    """
    if weights.startswith(HUB):
        return str(hub_folder(weights))
    url = join(weights, WEIGHTS)
    return url if not is_file(weights) and storage.exists(url) else weights


def check_start_weights(identity: ModelIdentity | None, model: ModelConfig, storage: Storage) -> None:
    """Check the initial weights of a new run, as far as possible without reading their tensors.

    Raises DataError if the classes of `model.weights` contradict those of the data. Raises WeightsError for missing
    weights, and for a model of Hugging Face or of m2f with another architecture or pixel mean.
    """
    if model.weights is None:
        _check_backbone(model, storage)
        return
    _require_files("model.weights", model.weights)
    is_hub = model.weights.startswith(HUB)
    weights = str(hub_folder(model.weights, weights=False)) if is_hub else resolve_start_weights(model.weights, storage)
    found = read_identity(weights, storage)
    if "://" not in weights and known_labels(weights) is not None:
        require_same_architecture(Path(weights), model, model.weights)
    elif found is not None:
        require_stored_architecture(_stored_model(found), model, model.weights)
    _match_rows(identity, found, weights)


def _check_backbone(model: ModelConfig, storage: Storage) -> None:
    """Raise WeightsError if `model.backbone.weights` is missing, or states another pixel mean or deviation."""
    weights = model.backbone.weights
    _require_files("model.backbone.weights", weights)
    if weights is None or weights.startswith((HUB, PACKAGE)):
        return
    found = read_identity(resolve_start_weights(weights, storage), storage)
    if found is not None:
        rules = {"pixel_mean": found.input.pixel_mean, "pixel_std": found.input.pixel_std}
        require_stored_architecture(rules, model, weights, "model.backbone.weights")


def _require_files(setting: str, weights: str | None) -> None:
    """Raise WeightsError if a local file or folder, or a package, is missing. URLs are checked when they are read."""
    if weights is None or weights.startswith(HUB) or "://" in weights:
        return
    try:
        weights_files(weights_path(weights))
    except WeightsError as error:
        raise WeightsError(f"{setting}: {error}; set it to an existing file or folder") from error


def start_weights(setting: str, source: str, path: Path) -> StartWeights:
    """Return the value of a weights setting with the digest of the file or folder at `path` that it refers to."""
    return StartWeights(setting=setting, source=source, sha256=weights_sha256(path))


def backbone_start(source: str | None, backbone: BackboneConfig) -> tuple[StartWeights, ...]:
    """Return `model.backbone.weights` with its digest; empty for weights that timm downloads, or without weights.

    `source` is the value in the recipe, and `backbone` are the settings that `fetched_backbone` provides.
    """
    if source is None or backbone.weights is None:
        return ()
    return (start_weights("model.backbone.weights", source, weights_path(backbone.weights)),)


@contextmanager
def fetched_backbone(model: ModelConfig, storage: Storage) -> Iterator[ModelConfig]:
    """Provide the settings of a model with `backbone.weights` at a local path; see `fetched_weights`.

    The value for a model of the hub or a package stays unchanged.
    """
    weights = model.backbone.weights
    if weights is None or weights.startswith((HUB, PACKAGE)):
        yield model
        return
    with fetched_weights(resolve_start_weights(weights, storage), storage) as path:
        yield replace(model, backbone=replace(model.backbone, weights=str(path)))


@contextmanager
def fetched_weights(weights: str, storage: Storage) -> Iterator[Path]:
    """Provide weights from a URL, a file or a local folder at a local path, with a file of frozen weights beside it.

    Raises CheckpointError naming file and checkpoint if the weights of a checkpoint differ from its manifest.
    """
    with ScratchFolder("weights") as folder:
        path = Path(weights)
        if "://" in weights:
            path = folder / weights.rpartition("/")[2]
            storage.get_file(weights, path)
        _check(weights, path, storage)
        if path.is_file() and (name := frozen_file(path)) is not None:
            url, frozen = join(weights.rpartition("/")[0], name), path.with_name(name)
            if "://" in weights:
                storage.get_file(url, frozen)
            if frozen.is_file():  # reading the tensors reports a missing file
                _check(url, frozen, storage)
        yield path


def read_identity(weights: str, storage: Storage) -> ModelIdentity | None:
    """Return the identity of weights, from their checkpoint folder, file or Hugging Face folder; None if it has none.

    The identity in a Hugging Face folder does not count if its classes are not those of the model.

    Raises CheckpointError if the identity is damaged.
    """
    folder, _, name = weights.rpartition("/")
    if name in (AVERAGE, WEIGHTS) and storage.exists(url := join(folder, IDENTITY)):
        with fetched_weights(url, storage) as path:
            return ModelIdentity.from_json(path.read_bytes(), url)
    if "://" not in weights and Path(weights).is_dir():
        if not is_hugging_face_folder(weights) or known_labels(weights) is None:
            return None
        described = read_hugging_face_config(weights)
        if (text := described.notes.get(METADATA_KEY)) is None:
            return None
        identity = ModelIdentity.from_json(text, f"{weights}/config.json")
        # If transformers trains a model for other classes, it replaces their names, but keeps the old notes.
        names = tuple(category.name for category in identity.label_spaces[0].classes)
        return identity if names == described.labels else None
    if "://" not in weights:
        return read_metadata(weights)
    with fetched_weights(weights, storage) as path:
        return read_metadata(path)


def known_class_rows(identity: ModelIdentity | None, weights: str, storage: Storage) -> tuple[int | None, ...] | None:
    """Return, for every class of a new run, the label of that name in its start weights; None if they lack the class.

    Return None if the class head can be used unchanged. Raises DataError showing the rows of both tables if they
    contradict each other.
    """
    return None if identity is None else _match_rows(identity, read_identity(weights, storage), weights)


def _match_rows(
    identity: ModelIdentity | None, found: ModelIdentity | None, weights: str
) -> tuple[int | None, ...] | None:
    """Return the rows of `known_class_rows` for weights with the identity `found`."""
    if identity is None:
        return None
    if found is None:
        return _rows_by_name(identity, weights)
    spaces = identity.label_spaces[0], found.label_spaces[0]
    new, old = (space.classes for space in spaces)
    if any(space.task == "semantic" for space in spaces):  # a semantic model treats things and stuff alike
        new, old = (tuple(replace(category, is_thing=False) for category in classes) for classes in (new, old))
    match = match_classes(new, old, ids=False)
    if match.kind == "conflict" and any(label is not None for label in match.labels):
        require_match(new, old, "the training data", weights, ids=False)
    return None if match.labels == tuple(range(len(old))) else match.labels


def _stored_model(identity: ModelIdentity) -> dict[str, object]:
    """Return the `model` section of the stored recipe, or only its pixel mean and deviation if there is no recipe."""
    rules: dict[str, object] = {"pixel_mean": identity.input.pixel_mean, "pixel_std": identity.input.pixel_std}
    try:
        tree = parse_yaml(identity.recipe)
    except DocumentError:
        return rules
    section = tree.get("model") if isinstance(tree, dict) else None
    return rules | (section if isinstance(section, dict) else {})


def _rows_by_name(identity: ModelIdentity, weights: str) -> tuple[int | None, ...] | None:
    """Match classes by name in a Hugging Face folder, which does not distinguish things from stuff.

    Repeated names match nothing.
    """
    labels = None if "://" in weights else known_labels(weights)
    if not labels:
        return None
    places = {name: place for place, name in enumerate(labels) if labels.count(name) == 1}
    rows = tuple(places.get(category.name) for category in identity.label_spaces[0].classes)
    return None if rows == tuple(range(len(labels))) else rows


def _check(weights: str, path: Path, storage: Storage) -> None:
    """Compare a file of a checkpoint with the manifest beside it, if there is one. Raises CheckpointError."""
    folder, _, name = weights.rpartition("/")
    is_stored = name in (AVERAGE, WEIGHTS, IDENTITY) or is_frozen(name)
    if not is_stored or not storage.exists(join(folder, MANIFEST)):
        return
    stated = read_manifest(storage, folder).files.get(name)
    if stated is not None and file_entry(path) != stated:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: the checksum of {name} differs from the manifest's; copy it again, or "
            "use another checkpoint"
        )
