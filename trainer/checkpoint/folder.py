"""Layout of a checkpoint folder, when a checkpoint is valid, and which folders are kept.

Imports neither torch nor DeepSpeed.

<run folder>/checkpoints/step_00000042-3/     step and number of the lease (see `lease_record`); older folders have none
    engine/*.pt             DeepSpeed's files of every rank
    rng/rank_00000.pt       random states of every rank
    frozen-SHA256.safetensors  what `model.freeze` freezes, in fp32; written once per run, see `frozen`
    weights.safetensors     all other weights in fp32; `m2f.model.weights.load.load_weights` loads both files
    ema.safetensors         the same with the moving average of the weights, if the run keeps one
    identity.json           classes, task, input and recipe of the model (see `identity`); also in the weights' metadata
    state.json              TrainState
    recipe.yaml             the resolved recipe
    receipts/rank_00000.json  files of one rank with sizes and checksums, written when all of them are uploaded
    manifest.json           all receipts joined; written last, once: without it the checkpoint does not exist
    damaged.json            the manifest of a checkpoint that was found damaged
    pins/NAME               the folder is not deleted while any of these exists
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.errors import MissingObjectError, StorageError
from m2f.data_pipeline.keys import key_problem
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.checkpoint.lease_record import accepted_names, check_lease, newest_number
from m2f.trainer.errors import CheckpointError, NewerFormatError, TrainingError
from m2f.trainer.reporting import CommittedCheckpoint

MANIFEST = "manifest.json"
DAMAGED = "damaged.json"
WEIGHTS = "weights.safetensors"
AVERAGE = "ema.safetensors"
STATE = "state.json"
RECIPE = "recipe.yaml"
ENGINE = "engine"
EVALUATION_PIN = "evaluation"
"""Name of the pin that keeps a checkpoint until its evaluation ends."""
_LEGACY_METRICS = "metrics.json"

_VERSION, _FROZEN_VERSION = 1, 2
"""Formats of manifest.json, without and with a file of frozen weights. A change that older programs cannot read needs
another number."""
_FROZEN = re.compile(r"frozen-[0-9a-f]{64}\.safetensors")
_FOLDER = re.compile(r"/(step_(\d{8,})(?:-(\d+))?)/(.+)$")


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    size: int
    """Size in bytes."""
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """Files that one rank has uploaded."""

    attempt: str
    """Identifies the start of the run that wrote the files, to ignore leftovers of an interrupted one."""
    files: Mapping[str, FileEntry]
    """Files by path relative to the checkpoint folder."""


@dataclass(frozen=True)
class CheckpointManifest:
    """Manifest of a checkpoint, which commits it."""

    step: int
    world_size: int
    zero_stage: int
    files: Mapping[str, FileEntry]

    @property
    def frozen(self) -> str | None:
        """Name of the file with the frozen weights; None without frozen parts and for runs of earlier versions."""
        return next(filter(is_frozen, self.files), None)

    def to_json(self) -> bytes:
        """Return the content of `manifest.json`."""
        version = _VERSION if self.frozen is None else _FROZEN_VERSION
        return json.dumps({"version": version, **asdict(self)}, indent=1).encode()


def frozen_name(entry: FileEntry) -> str:
    """Return the name of a file of frozen weights with this content."""
    return f"frozen-{entry.sha256}.safetensors"


def is_frozen(name: str) -> bool:
    """Return whether a file of a checkpoint has this run's frozen weights, given its name."""
    return _FROZEN.fullmatch(name) is not None


def checkpoint_url(run_folder: str, step: int, lease: int = 0) -> str:
    """Return the folder of the checkpoint after `step` optimizer steps; `lease` 0 stands for a run without a lease."""
    return join(run_folder, "checkpoints", f"step_{step:08d}" + (f"-{lease}" if lease else ""))


def receipt_url(url: str, rank: int) -> str:
    """Return the URL of a rank's receipt in the checkpoint folder `url`."""
    return join(url, "receipts", f"rank_{rank:05d}.json")


def rng_path(rank: int) -> str:
    """Return the path of a rank's random states, relative to the checkpoint folder."""
    return f"rng/rank_{rank:05d}.pt"


def write_receipt(storage: Storage, url: str, rank: int, receipt: Receipt) -> None:
    """Store a rank's receipt, which states that all of its files are uploaded."""
    storage.put(receipt_url(url, rank), json.dumps(asdict(receipt), indent=1).encode())


def read_receipt(storage: Storage, url: str, rank: int) -> Receipt | None:
    """Return a rank's receipt; None if it does not exist yet. Raises CheckpointError if it is unreadable."""
    address = receipt_url(url, rank)
    if not storage.exists(address):
        return None
    data = storage.get(address)
    try:
        content = parse_json(data)
        return Receipt(content["attempt"], _entries(content["files"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{address} cannot be read ({error}); restart the run to save the checkpoint again"
        ) from error


def read_manifest(storage: Storage, url: str) -> CheckpointManifest:
    """Return the manifest of the checkpoint folder `url`.

    Raises:
        CheckpointError: it is damaged or not a manifest of this program.
        NewerFormatError: a newer version of this program wrote it.
        StorageError: it is missing, or the storage does not answer.
    """
    address = join(url, MANIFEST)
    try:
        content = parse_json(storage.get(address))
        version = int(content["version"])
        if version > _FROZEN_VERSION:
            raise NewerFormatError(
                f"{address} has format {version}, but this version of m2f only supports formats up to "
                f"{_FROZEN_VERSION}; use the m2f that wrote it, or train under another name. To resume from an older "
                f"checkpoint, delete {url}"
            )
        if version not in (_VERSION, _FROZEN_VERSION):
            raise ValueError(f"unknown format {version}")
        return CheckpointManifest(
            content["step"], content["world_size"], content["zero_stage"], files=_entries(content["files"])
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, TrainingError | StorageError):
            raise
        raise CheckpointError(f"{address} cannot be read ({error}); resume from an older checkpoint") from error


def list_checkpoints(storage: Storage, run_folder: str) -> tuple[CommittedCheckpoint, ...]:
    """Return the committed checkpoints of a run, newest first, without checking their files.

    For each step only the checkpoint of the highest lease is returned. Commits that a holder made after another process
    had taken over the run are ignored.
    """
    return tuple(list_pins(storage, run_folder))


def list_pins(storage: Storage, run_folder: str) -> dict[CommittedCheckpoint, frozenset[str]]:
    """Return the names of the pins of each checkpoint that `list_checkpoints` returns, in the same order."""
    files = _parse_urls(storage.list(join(run_folder, "checkpoints")))
    accepted = _accepted_folders(storage, run_folder, {file.folder for file in files if file.path == MANIFEST})
    by_step = {folder.step: folder for folder in sorted(accepted, key=lambda folder: folder.lease)}
    names: dict[_Folder, set[str]] = {by_step[step]: set() for step in sorted(by_step, reverse=True)}
    for file in files:
        if file.folder in names and file.path.startswith("pins/"):
            names[file.folder].add(file.path.removeprefix("pins/"))
    return {CommittedCheckpoint(f.step, f.url(run_folder)): frozenset(found) for f, found in names.items()}


def _accepted_folders(storage: Storage, run_folder: str, folders: Iterable[_Folder]) -> set[_Folder]:
    """Return the folders whose commits are valid under the leases of the run."""
    newest, accepted = newest_number(storage, run_folder), set[_Folder]()
    for lease in {folder.lease for folder in folders}:
        lease_folders = [folder for folder in folders if folder.lease == lease]
        names = accepted_names(storage, run_folder, newest, lease, [folder.name for folder in lease_folders])
        accepted |= {folder for folder in lease_folders if folder.name in names}
    return accepted


def newest_undamaged(storage: Storage, run_folder: str) -> CommittedCheckpoint | None:
    """Return the newest committed checkpoint whose files exist with the right sizes; None if there is none."""
    for checkpoint in list_checkpoints(storage, run_folder):
        try:
            verify_sizes(storage, checkpoint.url)
        except CheckpointError:
            continue
        return checkpoint
    return None


def newest_step(storage: Storage, run_folder: str) -> int:
    """Return the step of the newest undamaged checkpoint; 0 if there is none."""
    newest = newest_undamaged(storage, run_folder)
    return 0 if newest is None else newest.step


def parse_folder(url: str) -> tuple[int, int]:
    """Return the step and the lease of a checkpoint folder, given its name or URL; lease 0 if the name has none."""
    match = _FOLDER.search(f"/{url.rstrip('/').rpartition('/')[2]}/_")
    assert match is not None, url
    return int(match[2]), int(match[3] or 0)


def read_legacy_metrics(storage: Storage, url: str) -> dict[int, dict[str, float]]:
    """Return the metrics by step that a checkpoint of version 0.1 stores; {} for later versions or damaged metrics."""
    if not storage.exists(join(url, _LEGACY_METRICS)):
        return {}
    with ScratchFolder("metrics") as folder:
        try:
            fetch(storage, url, [_LEGACY_METRICS], read_manifest(storage, url), folder)
        except CheckpointError:
            return {}
        return parse_metrics((folder / _LEGACY_METRICS).read_bytes())


def parse_metrics(data: bytes) -> dict[int, dict[str, float]]:
    """Parse stored metrics by step. Raises ValueError for any other content."""
    content = parse_json(data)
    try:
        return {
            int(step): {str(name): float(value) for name, value in values.items()} for step, values in content.items()
        }
    except (TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error


def set_aside(storage: Storage, url: str) -> None:
    """Remove a damaged checkpoint from the run's list; its files stay for inspection."""
    storage.put(join(url, DAMAGED), storage.get(join(url, MANIFEST)))
    storage.delete(join(url, MANIFEST))


def verify_sizes(storage: Storage, url: str) -> CheckpointManifest:
    """Check that every file of a checkpoint exists with the right size, and return its manifest.

    Raises CheckpointError naming the file if the checkpoint is damaged. Raises StorageError if the storage does
    not answer, and NewerFormatError if a newer version of this program wrote the manifest.
    """
    manifest = read_manifest(storage, url)
    for path, entry in manifest.files.items():
        address = join(url, path)
        try:
            size = storage.size(address)
        except MissingObjectError as error:
            raise CheckpointError(f"checkpoint {url} is incomplete: {error}") from error
        if size != entry.size:
            raise CheckpointError(f"checkpoint {url} is damaged: {path} has {size} bytes instead of {entry.size}")
    return manifest


def fetch(storage: Storage, url: str, paths: Sequence[str], manifest: CheckpointManifest, folder: Path) -> None:
    """Download files of a checkpoint and compare their checksums with the manifest.

    Raises CheckpointError if one is damaged or missing, and StorageError if the storage does not answer.
    """
    for path in paths:
        if path not in manifest.files:
            raise CheckpointError(f"checkpoint {url} has no {path}")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage.get_file(join(url, path), target)
        except MissingObjectError as error:
            raise CheckpointError(f"checkpoint {url} is incomplete: {error}") from error
        if file_entry(target) != manifest.files[path]:
            raise CheckpointError(f"checkpoint {url} is damaged: the checksum of {path} differs from the manifest")


def file_entry(path: Path) -> FileEntry:
    """Return the size in bytes and the SHA-256 of a local file."""
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def pin(storage: Storage, url: str, name: str) -> None:
    """Keep the checkpoint folder `url` until `unpin` is called with the same name."""
    storage.put(join(url, "pins", name), b"")


def unpin(storage: Storage, url: str, name: str) -> None:
    """Remove a pin, if it exists."""
    storage.delete(join(url, "pins", name))


def pins(storage: Storage, url: str) -> tuple[str, ...]:
    """Return the names of all pins of a checkpoint folder."""
    folder = join(url, "pins")
    return tuple(address.removeprefix(f"{folder}/") for address in storage.list(folder))


def delete_old(storage: Storage, run_folder: str, newest: int, keep: int, lease: int = 0) -> None:
    """Delete the folders that `folders_to_delete` returns, after the commit of step `newest` under `lease`.

    Raises LeaseLostError if another process has taken over the run.
    """
    urls = storage.list(join(run_folder, "checkpoints"))
    committed = {file.folder for file in _parse_urls(urls) if file.path == MANIFEST}
    ignored = committed - _accepted_folders(storage, run_folder, committed)
    for name in folders_to_delete(urls, newest, keep, lease, frozenset(folder.name for folder in ignored)):
        url = join(run_folder, "checkpoints", name)
        check_lease(storage, run_folder, lease)
        if pins(storage, url):  # pinned after the listing
            continue
        storage.delete(join(url, MANIFEST))  # first, so that a half-deleted checkpoint is not listed
        storage.delete_prefix(url)


def folders_to_delete(
    urls: Sequence[str], newest: int, keep: int, lease: int = 0, ignored: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """Return the names of the checkpoint folders to delete, given the URLs of all objects.

    These are folders older than the `keep` newest committed steps, without a pin, and not written under a higher lease.
    Commits in `ignored` folders are not counted. Nor are steps after `newest`: they are damaged, or the run was rolled
    back to before them.
    """
    found = [file for file in _parse_urls(urls) if file.folder.step <= newest]
    accepted = {file.folder.step for file in found if file.path == MANIFEST and file.folder.name not in ignored}
    committed = sorted(accepted, reverse=True)
    pinned = {file.folder for file in found if file.path.startswith("pins/")}
    if len(committed) < keep:
        return ()
    oldest_kept = committed[keep - 1]
    old = {file.folder for file in found if file.folder.step < oldest_kept and file.folder.lease <= lease}
    return tuple(sorted(folder.name for folder in old - pinned))


def orphan_folders(storage: Storage, run_folder: str, oldest_lease_in_use: int) -> tuple[tuple[str, str], ...]:
    """Return the checkpoint folders of older leases that no run resumes from, each with the reason.

    A folder with any pin other than that of its evaluation is kept.
    """
    paths: dict[_Folder, set[str]] = {}
    for file in _parse_urls(storage.list(join(run_folder, "checkpoints"))):
        paths.setdefault(file.folder, set()).add(file.path)
    accepted = _accepted_folders(storage, run_folder, [folder for folder, found in paths.items() if MANIFEST in found])
    orphans = []
    for folder, found in sorted(paths.items(), key=lambda item: item[0].name):
        pinned = any(path.startswith("pins/") and path != f"pins/{EVALUATION_PIN}" for path in found)
        if folder not in accepted and folder.lease < oldest_lease_in_use and not pinned:
            orphans.append((folder.url(run_folder), _orphan_reason(found)))
    return tuple(orphans)


def _orphan_reason(paths: set[str]) -> str:
    if MANIFEST in paths:
        return "committed after another process took over the run"
    return "set aside as damaged" if DAMAGED in paths else "never committed"


def lease_of_url(url: str) -> int | None:
    """Return the lease of the checkpoint folder that contains an object; None for an object elsewhere."""
    match = _FOLDER.search(url)
    return None if match is None else int(match[3] or 0)


@dataclass(frozen=True)
class _Folder:
    """A checkpoint folder, with the step and lease in its name."""

    name: str
    step: int
    lease: int

    def url(self, run_folder: str) -> str:
        return join(run_folder, "checkpoints", self.name)


@dataclass(frozen=True)
class _File:
    """An object in a checkpoint folder, with its path relative to that folder."""

    folder: _Folder
    path: str


def _parse_urls(urls: Sequence[str]) -> list[_File]:
    matches = [match for url in urls if (match := _FOLDER.search(url))]
    return [_File(_Folder(match[1], int(match[2]), int(match[3] or 0)), match[4]) for match in matches]


def _entries(files: Mapping[str, Mapping[str, int | str]]) -> dict[str, FileEntry]:
    for path in files:
        if (problem := key_problem(path)) is not None:
            raise ValueError(f"the file name {path!a:.100} {problem}")
    return {path: FileEntry(int(entry["size"]), str(entry["sha256"])) for path, entry in files.items()}
