"""Identity of a model: classes, task, input and recipe. Stored beside the weights and in their metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

from m2f.data_pipeline.categories import Category, Task
from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.label_space import ClassMatch, LabelSpace
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.errors import CheckpointError

IDENTITY = "identity.json"
"""File name in a checkpoint folder."""
METADATA_KEY = "m2f.identity"
"""Key of the same text in the metadata of weights and exported models."""
CLASS_CHANGE_REMEDY = (
    "revert the change, or train under another name from its weights (model.weights), which keeps the class-head rows "
    "of shared classes"
)
_VERSION = 1
"""Format of identity.json. A change that older programs cannot read must raise it."""


@dataclass(frozen=True, kw_only=True)
class InputRules:
    """Preprocessing of an image before it enters the model."""

    shortest_edge: int
    """Length of the shorter side in pixels."""
    max_size: int
    """Largest length of the longer side in pixels."""
    pixel_mean: tuple[float, float, float]
    """RGB, on a scale from 0 to 255."""
    pixel_std: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class StartWeights:
    """Weights that a run started from."""

    setting: str
    """Setting that names the weights: `model.weights` or `model.backbone.weights`."""
    source: str
    """Value of the setting, with the commit if it is a model of the hub."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What a checkpoint states about its model, readable without shards and run folder."""

    label_spaces: tuple[LabelSpace, ...]
    """Label spaces of the model; currently exactly one."""
    input: InputRules
    num_queries: int
    recipe: str = ""
    """The effective recipe (YAML)."""
    start: tuple[StartWeights, ...] = ()
    """Weights that the training started from; empty for random weights, and for runs of earlier versions."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks that the model was trained for."""
        return tuple(space.task for space in self.label_spaces)

    @property
    def recipe_sha256(self) -> str:
        """Hexadecimal SHA-256 of the text of the recipe."""
        return hashlib.sha256(self.recipe.encode()).hexdigest()

    def to_json(self) -> str:
        """Return the text for `identity.json` and for metadata."""
        content = {
            "version": _VERSION,
            "tasks": list(self.tasks),
            "label_spaces": [space.to_json() for space in self.label_spaces],
            "input": asdict(self.input),
            "num_queries": self.num_queries,
            "recipe_sha256": self.recipe_sha256,
            "recipe": self.recipe,
        }
        if self.start:
            content["start"] = [asdict(weights) for weights in self.start]
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> Self:
        """Parse the stored text. Raises CheckpointError naming `source`."""
        try:
            content = parse_json(text)
            if content["version"] != _VERSION:
                raise CheckpointError(f"{source} was written by a newer version of m2f; upgrade m2f")
            return cls(
                label_spaces=tuple(LabelSpace.from_json(space, source) for space in content["label_spaces"]),
                input=_input_rules(content["input"]),
                num_queries=int(content["num_queries"]),
                recipe=str(content["recipe"]),
                start=tuple(
                    StartWeights(**{name: str(row[name]) for name in ("setting", "source", "sha256")})
                    for row in content.get("start", ())
                ),
            )
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, DataError) as error:
            raise CheckpointError(f"{source} is not a valid model identity ({error}); restore it") from error


def store_identity(folder: Path, identity: ModelIdentity | None) -> dict[str, str]:
    """Write `identity.json` to a folder; return the metadata for the safetensors files beside it."""
    if identity is None:
        return {"format": "pt"}
    text = identity.to_json()
    (folder / IDENTITY).write_text(text, encoding="utf-8")
    return {"format": "pt", METADATA_KEY: text}


def read_metadata(path: str | Path) -> ModelIdentity | None:
    """Return the identity in a local safetensors file or an exported official checkpoint; None if it has none.

    Raises CheckpointError for an invalid identity.
    """
    path = Path(path)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(9)
        if head[8:9] != b"{":
            return _read_official(path) if head.startswith(b"PK\x03\x04") else None
        size = int.from_bytes(head[:8], "little")
        file.seek(8)
        if size > path.stat().st_size:
            return None  # loading the tensors reports that the file is truncated
        try:
            text = parse_json(file.read(size)).get("__metadata__", {}).get(METADATA_KEY)
        except (ValueError, AttributeError):
            return None
    return None if text is None else ModelIdentity.from_json(text, str(path))


def require_same_classes(task: str, classes: tuple[Category, ...] | None, current: ModelIdentity, url: str) -> None:
    """Check that checkpoint `url`, with this task and these classes (None: unknown), fits the run that resumes from it.

    Raises CheckpointError if they differ, because weights and optimizer state would be misinterpreted.
    """
    space = current.label_spaces[0]
    if task != space.task:
        raise CheckpointError(
            f"checkpoint {url} is of a model for the task {task}, but data.task is {space.task}; {CLASS_CHANGE_REMEDY}"
        )
    if classes is None or [(c.name, c.is_thing) for c in classes] == [(c.name, c.is_thing) for c in space.classes]:
        return  # ids and colours do not affect the weights
    rows = zip_longest(classes, space.classes)
    differing = tuple((a, b) for a, b in rows if a is None or b is None or (a.name, a.is_thing) != (b.name, b.is_thing))
    raise CheckpointError(
        f"checkpoint {url} and the training data have different classes; {CLASS_CHANGE_REMEDY}. Differences by "
        "label:\n  " + ClassMatch("conflict", (), differing).describe_rows("checkpoint", "data")
    )


def require_own_checkpoint(
    storage: Storage, urls: Sequence[str], current: ModelIdentity | None
) -> tuple[StartWeights, ...]:
    """Apply `require_same_classes` to the first checkpoint with a readable identity; return its start weights."""
    if current is None:
        return ()
    for url in urls:
        if storage.exists(address := join(url, IDENTITY)):
            try:
                stored = ModelIdentity.from_json(storage.get(address), address)
            except CheckpointError:
                continue  # damaged: resuming reports it
            require_same_classes(stored.tasks[0], stored.label_spaces[0].classes, current, url)
            return stored.start
    return ()


def _read_official(path: Path) -> ModelIdentity | None:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # `read_state` reports any problem with the file
        return None
    text = content.get(METADATA_KEY) if isinstance(content, Mapping) else None
    return None if not isinstance(text, str) else ModelIdentity.from_json(text, str(path))


def _input_rules(content: Mapping[str, Any]) -> InputRules:
    mean, std = (tuple(float(value) for value in content[name]) for name in ("pixel_mean", "pixel_std"))
    return InputRules(
        shortest_edge=int(content["shortest_edge"]),
        max_size=int(content["max_size"]),
        pixel_mean=(mean[0], mean[1], mean[2]),
        pixel_std=(std[0], std[1], std[2]),
    )
