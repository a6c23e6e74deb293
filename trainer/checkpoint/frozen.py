"""Frozen weights of a run: stored in one file, which all checkpoints of the run share.

`weights.safetensors` and `ema.safetensors` name the file in their metadata, and its name contains its SHA-256. The
digests of these two files therefore also identify the frozen weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from m2f.data_pipeline.errors import MissingObjectError
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.weights.files import FROZEN_KEY, read_state
from m2f.trainer.checkpoint.folder import FileEntry, file_entry, frozen_name
from m2f.trainer.reporting import CommittedCheckpoint


def write_frozen(weights: Mapping[str, Tensor], folder: Path) -> FileEntry:
    """Write frozen weights to a file in `folder`, under the name that `frozen_name` returns for its entry."""
    path = folder / "frozen"
    safetensors.torch.save_file(dict(weights), path, metadata={"format": "pt"})
    entry = file_entry(path)
    path.rename(folder / frozen_name(entry))
    return entry


def shares_frozen(storage: Storage, checkpoint: CommittedCheckpoint | None, entry: FileEntry | None) -> bool:
    """Return whether a checkpoint has this file of frozen weights, so that the next one can share it."""
    if checkpoint is None or entry is None:
        return False
    try:
        return storage.size(join(checkpoint.url, frozen_name(entry))) == entry.size
    except MissingObjectError:
        return False


def join_frozen(path: Path) -> None:
    """Rewrite a weights file so that it contains the frozen weights, whose file must lie in the same folder."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = {key: text for key, text in (file.metadata() or {}).items() if key != FROZEN_KEY}
    state = read_state(path)
    path.unlink()  # the tensors keep the mapped file alive
    safetensors.torch.save_file(state, path, metadata=metadata)
