"""Read weights files in any common format without executing code in them.

The first bytes determine the format, not the file name. Safetensors contain no code. Torch files are read with
`weights_only`. Plain pickles, which Detectron2 publishes, are read by an unpickler that supports arrays only.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from m2f.model.errors import WeightsError
from m2f.model.weights.pickles import PickledArray, read_pickle

_FOLDER_FILES = (
    "weights.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Possible files of a checkpoint folder of this project or a Hugging Face folder. The first one that exists is read."""

_CLASS_HEADS = (
    "class_embed.weight",
    "class_predictor.weight",
    "network.class_head.weight",
    "decoder.class_head.weight",
)
"""Name suffixes of the class head: of this project and the official code, of Hugging Face, and of the authors of EoMT
and PMT."""

FROZEN_KEY = "m2f.frozen"
"""Key in the metadata of a safetensors file. The value names the file in the same folder with the frozen weights."""

_LEGACY_TORCH = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
"""Magic number near the start of torch files from before version 1.6. A pickle that embeds such a file has it later."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Return tensors by name from a file, or from a checkpoint folder or Hugging Face model folder.

    Wrappers such as {"model": ...} are removed. Frozen weights in another file that a file names are included. Raises
    WeightsError if a file is missing, unsupported or unreadable.
    """
    path = Path(path)
    files = weights_files(path)
    if path.is_dir():
        return {name: tensor for file in files for name, tensor in read_state(file).items()}
    try:
        content = _read(path)
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"weights {path} cannot be read: {_reason(error, path)}") from error
    for wrapper in ("model", "state_dict", "blobs"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    state = {str(k): t for k, v in content.items() if (t := _tensor(v)) is not None} if _is_mapping(content) else {}
    if not state:
        raise WeightsError(f"weights {path} contain a {type(content).__name__} without named tensors")
    return state


def read_names(path: str | Path) -> tuple[str, ...]:
    """Return the names of the tensors that `read_state` returns. Of safetensors files, only the header is read.

    Raises WeightsError as `read_state` does.
    """
    names: list[str] = []
    for file in weights_files(Path(path)):
        try:
            with safetensors.safe_open(file, framework="pt") as tensors:
                names += tensors.keys()
        except (safetensors.SafetensorError, OSError):  # another format, or damaged
            names += read_state(file)
    return tuple(names)


def count_classes(path: str | Path) -> int | None:
    """Return the number of classes of the class head in a file or folder, without "no object".

    Return None if there is no class head or more than one. Raises WeightsError as `read_state` does.
    """
    heads = [tensor for name, tensor in read_state(path).items() if name.endswith(_CLASS_HEADS)]
    return len(heads[0]) - 1 if len(heads) == 1 else None


def frozen_file(path: Path) -> str | None:
    """Return the name of the file with the frozen weights of a local weights file, in the same folder; None without.

    Raises WeightsError if the name points to another folder.
    """
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":
            return None
    try:
        with safetensors.safe_open(path, "pt") as tensors:
            name = (tensors.metadata() or {}).get(FROZEN_KEY)
    except safetensors.SafetensorError:
        return None  # loading the tensors reports that the file is damaged
    if name is not None and not re.fullmatch(r"[\w-]+\.safetensors", name):
        raise WeightsError(f"weights {path}: refer to the file {name!r}, which is not in the same folder")
    return name


def weights_files(path: Path) -> tuple[Path, ...]:
    """Return the files that `read_state` reads, without files of frozen weights that they name.

    Raises WeightsError if the path or its weight files do not exist.
    """
    if path.is_dir():
        return _folder_files(path)
    if not path.is_file():
        raise WeightsError(f"weights {path}: no such file or folder")
    return (path,)


def weights_sha256(path: str | Path) -> str:
    """Return the SHA-256 of the file that `read_state` reads. If it names a file of frozen weights, it has its SHA-256.

    For several files, return the SHA-256 of the lines that `sha256sum` prints for them. Raises WeightsError if a file
    is missing or unreadable.
    """
    files = weights_files(Path(path))
    if len(files) == 1:
        return _sha256(files[0])
    lines = "".join(f"{_sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"weights {path} cannot be read: {error.strerror}") from error


def _folder_files(folder: Path) -> tuple[Path, ...]:
    found = next((folder / name for name in _FOLDER_FILES if (folder / name).is_file()), None)
    if found is None:
        raise WeightsError(f"weights {folder}: the folder contains none of {', '.join(_FOLDER_FILES)}")
    if found.suffix != ".json":
        return (found,)
    try:
        shards = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"weights {found}: not a weights index ({_first_sentence(error)})") from error
    for shard in shards:
        if shard != Path(shard).name:
            raise WeightsError(f"weights {found}: lists the file {shard!r}, which is not in the same folder")
    return tuple(folder / shard for shard in shards)


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(64)
        if head.startswith(b"PK\x03\x04") or _LEGACY_TORCH in head[:32]:
            return torch.load(path, map_location="cpu", weights_only=True)
        if head[8:9] == b"{":
            return safetensors.torch.load_file(path) | _read_frozen(path)
        if head.startswith(b"\x80"):
            file.seek(0)
            return read_pickle(file)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"weights {path} are a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    raise WeightsError(
        f"weights {path} ({path.stat().st_size} bytes) are neither a safetensors file nor a torch file nor a pickle"
    )


def _read_frozen(path: Path) -> dict[str, Tensor]:
    name = frozen_file(path)
    if name is None:
        return {}
    if not (path.parent / name).is_file():
        raise WeightsError(
            f"weights {path} lack the frozen weights, which are in {name}; copy that file into the same folder, or "
            "write all weights to one file with m2f checkpoint export"
        )
    return safetensors.torch.load_file(path.parent / name)


def _is_mapping(content: Any) -> bool:
    return isinstance(content, Mapping)


def _tensor(value: Any) -> Tensor | None:
    """Return a tensor unchanged, a numeric array as a tensor, and None for any other value."""
    if isinstance(value, PickledArray):
        return None if value.values is None else torch.from_numpy(value.values)
    return value if isinstance(value, Tensor) else None


def _reason(error: Exception, path: Path) -> str:
    """Return the cause of a reader's error.

    The message of torch is not shown, because it suggests loading the file unsafely.
    """
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and match:
        return f"it references {match[1]}, but weights files may contain only tensors; nothing in it was executed"
    return f"it may be truncated, it has {path.stat().st_size} bytes ({_first_sentence(error)})"


def _first_sentence(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0][:200]
