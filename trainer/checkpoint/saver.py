"""Save checkpoints: write local files, upload in the background, commit once all ranks have written receipts."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from m2f.data_pipeline.storage.scratch import ScratchFolder, report_full_disk, require_free_space
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.weights.files import FROZEN_KEY
from m2f.trainer.checkpoint.commits import record_commit, withdraw_commit, write_metrics
from m2f.trainer.checkpoint.folder import (
    AVERAGE,
    ENGINE,
    EVALUATION_PIN,
    MANIFEST,
    RECIPE,
    STATE,
    WEIGHTS,
    CheckpointManifest,
    FileEntry,
    Receipt,
    checkpoint_url,
    delete_old,
    file_entry,
    frozen_name,
    pin,
    read_receipt,
    rng_path,
    write_receipt,
)
from m2f.trainer.checkpoint.frozen import shares_frozen, write_frozen
from m2f.trainer.checkpoint.identity import store_identity
from m2f.trainer.checkpoint.lease_record import check_lease
from m2f.trainer.checkpoint.random_state import save_random_state
from m2f.trainer.checkpoint.size import checkpoint_bytes
from m2f.trainer.engine.engine import Engine
from m2f.trainer.errors import CheckpointError
from m2f.trainer.job import TrainJob
from m2f.trainer.ranks import Ranks
from m2f.trainer.reporting import CommittedCheckpoint
from m2f.trainer.state import TrainState
from m2f.trainer.telemetry.numbers import StepMetrics

_POLL_S = (0.05, 2.0)  # first and longest pause between checks for the other ranks' receipts


class CheckpointSaver:
    """Saves checkpoints of one run, with one upload at a time.

    Construction, `save` and `finish` are collectives. A failed upload stops the run: the next call of `newest_commit`
    or `finish` raises its error.
    """

    def __init__(self, job: TrainJob, storage: Storage, ranks: Ranks, resumed: CommittedCheckpoint | None) -> None:
        self._job = job
        self._storage = storage
        self._ranks = ranks
        self._attempt = ranks.broadcast(f"{time.time_ns():x}")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: Future[None] | None = None
        self._committed = resumed
        self._saved_step = None if resumed is None else resumed.step
        self._closing = threading.Event()
        self._frozen: FileEntry | None = None
        """The file of frozen weights; None before the first save, without frozen parts, and on other ranks."""

    def close(self) -> None:
        """End the thread without waiting for other ranks. If all have uploaded by now, the thread still commits."""
        self._closing.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def check_space(self, engine: Engine) -> None:
        """Check before the first step whether the disks have space for a checkpoint. Every rank must call it.

        The local disk must hold the files of all ranks on this machine; the disk of a local run folder must hold those
        of all ranks. Raises StorageError on all ranks if one has too little space.
        """
        ranks, host = self._ranks, socket.gethostname()
        own_bytes = checkpoint_bytes(engine.module.model, self._job.training, ranks.world_size, ranks.is_first)
        sizes = ranks.gather((host, own_bytes))
        machine_bytes = sum(size for other, size in sizes if other == host)
        ranks.run_on_all(lambda: require_free_space(machine_bytes, "a checkpoint of the ranks of this machine"))
        run_folder = self._job.run_folder
        if "://" not in run_folder:
            total = sum(size for _, size in sizes)
            remedy = "free some space, or choose an `output` on a larger disk"
            ranks.run_on_rank0(lambda: require_free_space(total, "a checkpoint", run_folder, remedy))

    def newest_commit(self) -> CommittedCheckpoint | None:
        """Return the newest commit known to this rank (rank 0: as soon as it is made). Raises an upload's error."""
        if self._upload is not None and self._upload.done():
            self._upload.result()
        return self._committed

    def save(self, engine: Engine, state: TrainState, metrics: Mapping[int, StepMetrics]) -> None:
        """Write this rank's files to the local disk and start their upload. Call `finish` before the next `save`.

        `metrics` (rank 0) holds the metrics since the last save, by step; they are stored with the commit. Does nothing
        if the same step was the last one saved or restored. Raises StorageError if the disk is full.
        """
        if state.step == self._saved_step:
            return
        assert self._upload is None, "the previous upload is not finished"
        url = checkpoint_url(self._job.run_folder, state.step, self._job.lease)
        self._ranks.run_on_rank0(lambda: self._clear(url))
        shares = self._ranks.run_on_rank0(lambda: shares_frozen(self._storage, self._committed, self._frozen))
        with report_full_disk(f"checkpoint {state.step}"):
            scratch = self._write(engine, state, {} if shares else engine.weights(frozen=True))
        self._upload = self._pool.submit(self._publish, scratch, url, state, dict(metrics))
        self._saved_step = state.step

    def finish(self) -> CommittedCheckpoint | None:
        """Wait until the last saved checkpoint is committed; return it on every rank, or None if there is none.

        If uploads failed, all ranks raise, with the errors of the ranks that failed.
        """
        self._await_uploads()
        error = self._upload.exception() if self._upload is not None else None
        self._ranks.check(error)
        self._upload = None
        return self._ranks.broadcast(self._committed)

    def _write(self, engine: Engine, state: TrainState, frozen: Mapping[str, Tensor]) -> ScratchFolder:
        """Write this rank's files to a folder on the local disk and return it.

        `frozen` has the frozen weights, unless the newest commit has a file of them.
        """
        scratch = ScratchFolder("checkpoint")
        folder = scratch.path
        try:
            engine.save(folder, ENGINE)
            save_random_state(folder / rng_path(self._ranks.rank))
            weights = engine.weights()
            averaged = engine.averaged_weights(weights)
            if self._ranks.is_first:
                metadata = store_identity(folder, self._job.effective_identity) | self._store_frozen(folder, frozen)
                if averaged is not None:
                    safetensors.torch.save_file(averaged, folder / AVERAGE, metadata=metadata)
                safetensors.torch.save_file(weights, folder / WEIGHTS, metadata=metadata)
                (folder / STATE).write_bytes(state.to_json())
                (folder / RECIPE).write_text(self._job.recipe, encoding="utf-8")
        except BaseException:
            scratch.remove()
            raise
        return scratch

    def _store_frozen(self, folder: Path, frozen: Mapping[str, Tensor]) -> dict[str, str]:
        """Write frozen weights if there are any; return the metadata for the weights files."""
        if frozen:
            self._frozen = write_frozen(frozen, folder)
        return {} if self._frozen is None else {FROZEN_KEY: frozen_name(self._frozen)}

    def _clear(self, url: str) -> None:
        """Delete the remains of an interrupted or damaged save."""
        check_lease(self._storage, self._job.run_folder, self._job.lease)
        withdraw_commit(self._storage, url)
        self._storage.delete_prefix(url)

    def _await_uploads(self) -> None:
        """Wait until no rank is uploading. Once one fails, rank 0 no longer waits for receipts.

        Ranks communicate meanwhile, so a slow upload causes no timeout.
        """
        upload, (pause, longest) = self._upload, _POLL_S
        while True:
            running = upload is not None and not upload.done()
            failed = upload is not None and not running and upload.exception() is not None
            num_running, num_failed = self._ranks.sum(torch.tensor([float(running), float(failed)])).tolist()
            if num_failed:
                self._closing.set()
            if not num_running:
                return
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _publish(self, scratch: ScratchFolder, url: str, state: TrainState, metrics: Mapping[int, StepMetrics]) -> None:
        with scratch as folder:
            frozen = self._frozen
            if frozen is not None and shares_frozen(self._storage, self._committed, frozen):
                # The first save after a restart wrote the file, although the checkpoint that it resumed has it.
                (folder / frozen_name(frozen)).unlink(missing_ok=True)
            paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".py"]
            files = {path.relative_to(folder).as_posix(): file_entry(path) for path in paths}
            for path in paths:
                self._storage.put_file(join(url, path.relative_to(folder).as_posix()), path)
            if frozen is not None and (name := frozen_name(frozen)) not in files:
                assert self._committed is not None
                self._storage.copy(join(self._committed.url, name), join(url, name))
                files[name] = frozen
            write_receipt(self._storage, url, self._ranks.rank, Receipt(self._attempt, files))
        if self._ranks.is_first:
            self._commit(url, state, metrics)

    def _commit(self, url: str, state: TrainState, metrics: Mapping[int, StepMetrics]) -> None:
        """Commit the checkpoint, unless the wait for a receipt is abandoned.

        Pin and metrics are stored before the manifest, the entry in `commits/` after it.
        """
        files = {}
        for rank in range(self._ranks.world_size):
            receipt = self._await_receipt(url, rank)
            if receipt is None:
                return
            files |= receipt.files
        manifest = CheckpointManifest(state.step, state.world_size, state.zero_stage, files).to_json()
        run_folder, lease = self._job.run_folder, self._job.lease
        check_lease(self._storage, run_folder, lease)
        if self._job.evaluates:
            pin(self._storage, url, EVALUATION_PIN)
        points = {step: values.values() for step, values in metrics.items()}
        write_metrics(self._storage, run_folder, state.step, lease, points)
        self._storage.put(join(url, MANIFEST), manifest, if_absent=True)
        committed = CommittedCheckpoint(state.step, url)
        record_commit(self._storage, committed, manifest)
        self._committed = committed
        delete_old(self._storage, run_folder, state.step, self._job.training.checkpoint.keep, lease)

    def _await_receipt(self, url: str, rank: int) -> Receipt | None:
        """Return the receipt of a rank; None if this saver closes or another rank fails before there is one.

        Raises CheckpointError if there is none after `upload_timeout_s`.
        """
        pause, longest = _POLL_S
        timeout_s = self._job.training.checkpoint.upload_timeout_s
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            receipt = read_receipt(self._storage, url, rank)
            if receipt is not None and receipt.attempt == self._attempt:
                return receipt
            if self._closing.wait(pause):
                return None
            pause = min(2 * pause, longest)
        raise CheckpointError(
            f"checkpoint {url} is not committed: rank {rank} did not upload its files within "
            f"{timeout_s:.0f} s (training.checkpoint.upload_timeout_s); check its log and the storage"
        )
