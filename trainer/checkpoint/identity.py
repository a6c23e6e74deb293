"""What weights mean: classes, task, input and the recipe that made them. Stored beside weights and inside them."""

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
"""File of a checkpoint folder."""
METADATA_KEY = "m2f.identity"
"""Where the same text stands in metadata of weights and of exported models."""
START_ANEW = (
    "set it back, or train under another name from its weights (model.weights), which keeps the rows of the classes "
    "that both have"
)
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class InputRules:
    """What an image becomes before it enters the model."""

    shortest_edge: int
    """Pixels of the shorter side."""
    max_size: int
    """Pixels that the longer side may have."""
    pixel_mean: tuple[float, float, float]
    """RGB, 0 to 255."""
    pixel_std: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class StartWeights:
    """A file of weights that a run began with."""

    setting: str
    """`model.weights` or `model.backbone.weights`."""
    source: str
    """The setting's value, with the commit where it is a model of the hub."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What a checkpoint knows about its model, without shards and run folder."""

    label_spaces: tuple[LabelSpace, ...]
    """One today."""
    input: InputRules
    num_queries: int
    recipe: str = ""
    """The effective recipe (YAML)."""
    start: tuple[StartWeights, ...] = ()
    """What the training began with; empty for random weights, and for runs of earlier versions."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What the model was trained for."""
        return tuple(space.task for space in self.label_spaces)

    @property
    def recipe_sha256(self) -> str:
        """Digest of the effective recipe."""
        return hashlib.sha256(self.recipe.encode()).hexdigest()

    def to_json(self) -> str:
        """As stored in `identity.json` and in metadata."""
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
        """Read back. Raises CheckpointError naming `source`."""
        try:
            content = parse_json(text)
            if content["version"] != _VERSION:
                raise CheckpointError(f"{source} was written by a newer version of this program; update it")
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
        except (ValueError, KeyError, TypeError, AttributeError, DataError) as error:
            raise CheckpointError(f"{source} does not say what the weights mean ({error}); restore it") from error


def store_identity(folder: Path, identity: ModelIdentity | None) -> dict[str, str]:
    """Write `identity.json` into a folder; returns the metadata for the safetensors files beside it."""
    if identity is None:
        return {"format": "pt"}
    text = identity.to_json()
    (folder / IDENTITY).write_text(text, encoding="utf-8")
    return {"format": "pt", METADATA_KEY: text}


def read_metadata(path: str | Path) -> ModelIdentity | None:
    """The identity in a local safetensors file or in an official checkpoint that we exported; None without any.

    Raises CheckpointError for metadata that cannot be read.
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
            return None  # whoever loads the tensors says that the file is cut off
        try:
            text = parse_json(file.read(size)).get("__metadata__", {}).get(METADATA_KEY)
        except (ValueError, AttributeError):
            return None
    return None if text is None else ModelIdentity.from_json(text, str(path))


def require_same_classes(task: str, classes: tuple[Category, ...] | None, now: ModelIdentity, url: str) -> None:
    """Compare the task and the classes (None: not known) of checkpoint `url` with those of a run that goes on from it.

    Raises CheckpointError: weights and optimizer state would be taken for something else.
    """
    space = now.label_spaces[0]
    if task != space.task:
        raise CheckpointError(
            f"checkpoint {url} is of a model for the task {task}, and data.task is {space.task}; {START_ANEW}"
        )
    if classes is None or [(c.name, c.is_thing) for c in classes] == [(c.name, c.is_thing) for c in space.classes]:
        return  # ids and colours are not in the weights
    rows = zip_longest(classes, space.classes)
    differing = tuple((a, b) for a, b in rows if a is None or b is None or (a.name, a.is_thing) != (b.name, b.is_thing))
    raise CheckpointError(
        f"checkpoint {url} has other classes than the training data, label by label; {START_ANEW}:\n  "
        + ClassMatch("conflict", (), differing).describe_rows("checkpoint", "data")
    )


def require_own_checkpoint(
    storage: Storage, urls: Sequence[str], now: ModelIdentity | None
) -> tuple[StartWeights, ...]:
    """`require_same_classes` for the first of these checkpoints that says what it is; what its run began with."""
    if now is None:
        return ()
    for url in urls:
        if storage.exists(address := join(url, IDENTITY)):
            try:
                stored = ModelIdentity.from_json(storage.get(address), address)
            except CheckpointError:
                continue  # damaged: resuming finds that out
            require_same_classes(stored.tasks[0], stored.label_spaces[0].classes, now, url)
            return stored.start
    return ()


def _read_official(path: Path) -> ModelIdentity | None:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever is wrong with it, `read_state` says it
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
