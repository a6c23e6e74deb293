"""Provenance of a run besides its recipe: the git commit of the code, and the fingerprints of the data sets."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import m2f
from m2f.cluster.recipe.config import RunConfig
from m2f.data_pipeline.shards.manifest import read_document
from m2f.data_pipeline.storage.storage import Storage

GIT_TIMEOUT_S = 10.0
"""Seconds for one command of git. On a slow network file system, a run starts without the facts of its code."""


@dataclass(frozen=True)
class DataInput:
    """One data set of a run."""

    name: str
    """Name in the recipe."""
    context: str
    """`training` or `evaluation`."""
    url: str
    fingerprint: str
    """Hex digest of categories, shards and their checksums."""
    images: int
    profile: str
    """JSON for display: the whole fingerprint, and the numbers of images, shards and bytes."""


def code_facts(folder: Path = m2f.ROOT) -> dict[str, str]:
    """Return commit and branch of the code, and the number of changed tracked files; {} outside a git checkout."""
    if not (folder / ".git").exists():
        return {}
    try:
        facts = {"code.commit": _git(folder, "rev-parse", "HEAD")}
        facts["code.branch"] = _git(folder, "rev-parse", "--abbrev-ref", "HEAD")
        facts["code.changed_files"] = str(len(_git(folder, "status", "--porcelain", "-uno").splitlines()))
    except (OSError, subprocess.SubprocessError):  # git is not installed, or refuses the checkout
        return {}
    return facts


def data_inputs(config: RunConfig, storage: Storage) -> tuple[DataInput, ...]:
    """Return the data sets for training, then those for evaluation. Data sets without shards are omitted."""
    used = [("training", item.dataset) for item in config.data.train]
    used += [("evaluation", chosen.dataset) for chosen in config.evaluation.sets]
    found = [data_input(config, context, name, storage) for context, name in dict.fromkeys(used)]
    return tuple(entry for entry in found if entry is not None)


def data_facts(inputs: Sequence[DataInput]) -> dict[str, str]:
    """Return the fingerprint of every data set by name, with the prefix `data.`."""
    return {f"data.{entry.name}": entry.fingerprint for entry in inputs}


def data_input(config: RunConfig, context: str, name: str, storage: Storage) -> DataInput | None:
    """Return a data set of a run; None if its shards do not exist yet."""
    url = config.datasets[name].shards
    document = read_document(url, storage)
    if document is None:
        return None
    shards = document["shards"]
    images = sum(shard["num_samples"] for shard in shards)
    profile = {
        "fingerprint": document["fingerprint"],
        "images": images,
        "shards": len(shards),
        "bytes": sum(shard["size"] for shard in shards),
    }
    return DataInput(name, context, url, document["fingerprint"], images, json.dumps(profile))


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=GIT_TIMEOUT_S).stdout.strip()
