"""Minimal driver with its rank 0: holds the lease of a run folder and commits one checkpoint after the other.

python leased_writer.py RUN_FOLDER LAST_STEP PAUSE_S OUTAGE [ENDPOINT_URL]

While the file OUTAGE exists, storage requests of this process fail.

Every file of a checkpoint contains the number of its lease, its step and the previous step. Prints a line per event.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from m2f.data_pipeline.config import StorageConfig
from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.errors import UserError
from m2f.trainer.checkpoint.folder import (
    MANIFEST,
    CheckpointManifest,
    checkpoint_url,
    delete_old,
    file_entry,
    newest_step,
)
from m2f.trainer.checkpoint.lease import Timing, hold_lease
from m2f.trainer.checkpoint.lease_record import check_lease

QUICK = Timing(renew_s=0.2, poll_s=0.1, unchanged_s=1.5)
NAMES = ("weights", "state")


class StorageWithOutages(Storage):
    """Storage whose requests fail while the file `outage` exists."""

    outage = Path()

    def _store(self, url):
        if self.outage.exists():
            raise StorageError(f"{url}: 503")
        return super()._store(url)


def commit(storage: Storage, run_folder: str, step: int, parent: int, lease: int, pause_s: float) -> None:
    """Commit a checkpoint as the saver does: clear, upload, check the lease, commit, delete old checkpoints."""
    url = checkpoint_url(run_folder, step, lease)
    check_lease(storage, run_folder, lease)
    storage.delete_prefix(url)
    files = {}
    with TemporaryDirectory() as folder:
        for name in NAMES:
            path = Path(folder, name)
            path.write_text(json.dumps({"lease": lease, "step": step, "parent": parent}))
            files[name] = file_entry(path)
            storage.put_file(join(url, name), path)
            time.sleep(pause_s)
    check_lease(storage, run_folder, lease)
    storage.put(join(url, MANIFEST), CheckpointManifest(step, 1, 0, files).to_json(), if_absent=True)
    delete_old(storage, run_folder, step, 1000, lease)


def write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    run_folder, last, pause_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    endpoint = sys.argv[5] if len(sys.argv) > 5 else None
    StorageWithOutages.outage = Path(sys.argv[4])
    storage = StorageWithOutages(StorageConfig(endpoint_url=endpoint, region="us-east-1", patience_s=1.0))
    try:
        with hold_lease(storage, run_folder, timing=QUICK) as lease:
            step = newest_step(storage, run_folder)
            write_line(f"holds {lease.number} from {step}")
            while step < last:
                lease.raise_if_lost()
                time.sleep(pause_s)
                try:
                    commit(storage, run_folder, step + 1, step, lease.number, pause_s)
                except StorageError:
                    write_line("waits for the store")
                    continue
                step += 1
                write_line(f"committed {step}")
        write_line("finished")
    except UserError as error:
        write_line(f"{type(error).__name__}: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
