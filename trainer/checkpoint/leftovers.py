"""Find and delete leftovers in a run folder: checkpoints without a valid commit, and writes never completed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.storage.object_info import UnfinishedWrite
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.checkpoint.folder import lease_of_url, orphan_folders
from m2f.trainer.checkpoint.lease_record import newest_number, read_record, record_url

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leftovers:
    """Folders and writes that may be deleted."""

    folders: tuple[tuple[str, str], ...]
    """Checkpoint folders, each with the reason."""
    writes: tuple[UnfinishedWrite, ...]
    """Temporary files and multipart uploads, including those in `folders`."""

    def __len__(self) -> int:
        return len(self.folders) + len(self.writes)

    def describe(self) -> list[str]:
        """Return one line per folder and write."""
        lines = [f"folder  {url}: {reason}" for url, reason in self.folders]
        kinds = [("upload" if write.upload else "part", write.url) for write in self.writes]
        return lines + [f"{kind:<6}  {url}: never completed" for kind, url in kinds]

    def delete(self, storage: Storage, check: Callable[[], None]) -> None:
        """Delete everything. `check` is called before each deletion and may raise an exception to stop."""
        for write in self.writes:
            check()
            storage.delete_unfinished(write)
        for url, _ in self.folders:
            check()
            storage.delete_prefix(url)


def find_leftovers(storage: Storage, run_folder: str, oldest_lease_in_use: int, is_only_writer: bool) -> Leftovers:
    """Find what processes with leases older than `oldest_lease_in_use` left behind.

    Writes outside of checkpoint folders have no lease. They are included only if `is_only_writer` is set, which means
    that no other process writes to the run folder.
    """
    leases = [(write, lease_of_url(write.url)) for write in storage.list_unfinished(run_folder)]
    unfinished = [
        write for write, lease in leases if (is_only_writer if lease is None else lease < oldest_lease_in_use)
    ]
    return Leftovers(orphan_folders(storage, run_folder, oldest_lease_in_use), tuple(unfinished))


def lease_in_use(storage: Storage, run_folder: str) -> int:
    """Return the first lease under which a process may be writing now, for a caller without a lease."""
    newest = newest_number(storage, run_folder)
    if not newest or storage.exists(f"{record_url(run_folder, newest)}.released"):
        return newest + 1
    return newest + read_record(storage, run_folder, newest).holder.is_dead()


def abort_outdated_writes(storage: Storage, run_folder: str) -> int:
    """Abort writes to checkpoints that were started under leases before the newest; return their number.

    Unfinished multipart uploads cost money and appear in no listing. If a store refuses to list or abort them, log a
    warning.
    """
    newest, aborted = newest_number(storage, run_folder), 0
    try:
        for write in storage.list_unfinished(join(run_folder, "checkpoints")):
            lease = lease_of_url(write.url)
            if lease is not None and lease < newest:
                storage.delete_unfinished(write)
                aborted += 1
    except StorageError as error:
        LOGGER.warning(f"incomplete uploads remain in the storage: {error}")
    return aborted
