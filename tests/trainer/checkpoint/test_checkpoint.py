"""Saving: frozen weights are written once. After a full disk or refused uploads nothing incomplete is committed."""

import errno
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from m2f.data_pipeline.config import DataConfig, MixtureItem
from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.storage.scratch import report_full_disk
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.config import ModelConfig
from m2f.model.weights.files import read_state
from m2f.trainer.checkpoint.commits import list_commits, read_metrics
from m2f.trainer.checkpoint.folder import EVALUATION_PIN, file_entry, list_checkpoints, pins, verify_sizes
from m2f.trainer.checkpoint.saver import CheckpointSaver
from m2f.trainer.config import CheckpointConfig, TrainingConfig
from m2f.trainer.errors import CheckpointError, PeersError
from m2f.trainer.job import TrainJob
from m2f.trainer.ranks import Ranks
from m2f.trainer.state import TrainState
from m2f.trainer.worker import process_group
from tests.trainer.step_metrics import with_loss
from tests.waiting import PATIENCE_S

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class SmallEngine:
    """Engine whose save writes one file."""

    def save(self, folder, tag):
        (folder / tag).mkdir()
        (folder / tag / "states.pt").write_bytes(b"states")

    def weights(self, frozen=False):
        return {} if frozen else {"w": torch.zeros(2)}

    def averaged_weights(self, weights):
        return None


@dataclass
class FullDisk(SmallEngine):
    """Engine whose save raises `error`."""

    error: Exception

    def save(self, folder, tag):
        raise self.error


class FrozenEngine(SmallEngine):
    """Engine with one trained and many frozen weights."""

    def weights(self, frozen=False):
        return {"backbone.w": torch.ones(25_000)} if frozen else super().weights()


class RefusingStorage(Storage):
    """Storage that accepts `accepts` more files and refuses the rest."""

    accepts = 10**9

    def put_file(self, url, path):
        if self.accepts <= 0:
            raise StorageError(f"{url}: the store refuses to write (AccessDenied); check its rights and its quota")
        self.accepts -= 1
        super().put_file(url, path)


class StorageWithoutSizes(Storage):
    """Storage that answers no question about the size of frozen weights."""

    def size(self, url):
        if "/frozen-" in url:
            raise StorageError(f"{url}: the store refuses to read (AccessDenied); check its rights")
        return super().size(url)


class Meeting:
    """Values that the threads of two ranks exchange."""

    def __init__(self):
        self.values, self.barrier = [None, None], threading.Barrier(2, timeout=PATIENCE_S)


class ThreadRanks(Ranks):
    """One of two ranks, each of which is a thread of this process."""

    def __init__(self, rank, meeting):
        self.rank, self.world_size, self.meeting = rank, 2, meeting

    def gather(self, value):
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        found = list(self.meeting.values)
        self.meeting.barrier.wait()
        return found

    def sum(self, values):
        return torch.stack(self.gather(values)).sum(0)

    def broadcast(self, value):
        return self.gather(value)[0]


@pytest.fixture
def ranks(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with process_group(torch.device("cpu"), timeout_s=30.0):
        yield Ranks(timeout_s=30.0)


@pytest.fixture
def job(tmp_path):
    return TrainJob(
        run_folder=str(tmp_path / "run"),
        model=ModelConfig(),
        data=DataConfig(train=(MixtureItem(dataset="train"),)),
        shards=("none",),
        training=TrainingConfig(max_steps=4),
    )


def state_at(step):
    return TrainState(step=step, position=4 * step, order_fingerprint="a", seed=0, world_size=1, zero_stage=1)


def scratch_folders():
    return set(Path(tempfile.gettempdir()).glob("m2f-checkpoint-*"))


@pytest.mark.parametrize("accepted", [0, 1, 3])
def test_refused_upload_is_reported_and_not_committed(ranks, job, accepted):
    storage = RefusingStorage()
    before = scratch_folders()
    with closing(CheckpointSaver(job, storage, ranks, None)) as saver:
        saver.save(SmallEngine(), state_at(1), {})
        assert saver.finish().step == 1
        storage.accepts = accepted
        saver.save(SmallEngine(), state_at(2), {})
        with pytest.raises(StorageError, match=r"step_00000002.* refuses to write"):
            saver.finish()
    assert [checkpoint.step for checkpoint in list_checkpoints(storage, job.run_folder)] == [1]
    assert scratch_folders() <= before
    with closing(CheckpointSaver(job, Storage(), ranks, None)) as saver:  # the next start can save the same step
        saver.save(SmallEngine(), state_at(2), {})
        assert saver.finish().step == 2


def test_refused_upload_of_one_rank_stops_all_ranks_with_its_error_only(job):
    meeting = Meeting()

    def save(rank):
        storage = RefusingStorage()
        storage.accepts = 0 if rank == 1 else storage.accepts
        with closing(CheckpointSaver(job, storage, ThreadRanks(rank, meeting), None)) as saver:
            saver.save(SmallEngine(), state_at(1), {})
            with pytest.raises(PeersError, match=r"rank 1: StorageError: .* refuses to write") as caught:
                saver.finish()
        return str(caught.value)

    with ThreadPoolExecutor(2) as threads:
        messages = list(threads.map(save, (0, 1)))
    assert messages[0] == messages[1]
    assert "rank 0" not in messages[0]  # it did not wait for the files of rank 1, which would take an hour
    assert list_checkpoints(Storage(), job.run_folder) == ()


def test_a_commit_is_listed_pinned_and_has_its_metrics(ranks, job):
    metrics = {3: with_loss(0.1 + 0.2), 4: with_loss(1e-300)}
    with closing(CheckpointSaver(replace(job, evaluates=True), Storage(), ranks, None)) as saver:
        saver.save(SmallEngine(), state_at(4), metrics)
        first = saver.finish()
        saver.save(SmallEngine(), state_at(5), {})
        second = saver.finish()
    assert [commit.checkpoint for commit in list_commits(Storage(), job.run_folder)] == [first, second]
    assert pins(Storage(), first.url) == (EVALUATION_PIN,)
    found = [points for _, points in read_metrics(Storage(), job.run_folder)]
    assert found == [{3: metrics[3].values(), 4: metrics[4].values()}, {}]


def test_frozen_weights_are_written_once_and_listed_by_every_checkpoint(ranks, job):
    written, found = [], []
    job = replace(job, training=replace(job.training, checkpoint=CheckpointConfig(every_steps=1, keep=1)))
    for steps in ((1, 2), (3,)):
        storage = Storage()
        with closing(CheckpointSaver(job, storage, ranks, found[-1] if found else None)) as saver:
            for step in steps:
                before = storage.counters.bytes_written
                saver.save(FrozenEngine(), state_at(step), {})
                found.append(saver.finish())
                written.append(storage.counters.bytes_written - before)
    assert written[0] > 100_000 > 30_000 > max(written[1:])
    assert list_checkpoints(Storage(), job.run_folder) == (found[-1],)  # the checkpoint that wrote the file is deleted
    manifest = verify_sizes(Storage(), found[-1].url)
    assert manifest.frozen == f"frozen-{manifest.files[manifest.frozen].sha256}.safetensors"
    assert read_state(found[-1].url).keys() == {"w", "backbone.w"}
    assert file_entry(Path(found[-1].url) / manifest.frozen) == manifest.files[manifest.frozen]


def test_frozen_weights_that_were_deleted_are_written_again(ranks, job):
    with closing(CheckpointSaver(job, Storage(), ranks, None)) as saver:
        saver.save(FrozenEngine(), state_at(1), {})
        first = saver.finish()
        next(Path(first.url).glob("frozen-*")).unlink()
        saver.save(FrozenEngine(), state_at(2), {})
        second = saver.finish()
    verify_sizes(Storage(), second.url)
    with pytest.raises(CheckpointError, match=r"step_00000001 is incomplete: .*/frozen-"):
        verify_sizes(Storage(), first.url)


def test_failed_search_for_frozen_weights_after_a_restart_stops_all_ranks(job):
    """Rank 0 alone asks the store, and the other ranks must not wait for it."""
    meeting = Meeting()

    def start(rank, storage, resumed):
        return closing(CheckpointSaver(job, storage, ThreadRanks(rank, meeting), resumed))

    def save_and_restart(rank):
        try:
            with start(rank, Storage(), None) as saver:
                saver.save(FrozenEngine(), state_at(1), {})
                resumed = saver.finish()
            with start(rank, StorageWithoutSizes(), resumed) as saver:
                saver.save(FrozenEngine(), state_at(2), {})
                with pytest.raises(PeersError, match=r"rank 0: StorageError: .*/frozen-.* refuses to read"):
                    saver.finish()
        except BaseException:
            meeting.barrier.abort()  # the other rank would wait for PATIENCE_S
            raise

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(save_and_restart, (0, 1)))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "optim_states.pt"),
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 39296 vs 39190"),  # by torch.save
    ],
)
def test_full_local_disk_is_reported_and_leaves_no_files(ranks, job, error):
    before = scratch_folders()
    with (
        closing(CheckpointSaver(job, Storage(), ranks, None)) as saver,
        pytest.raises(StorageError, match=rf"^{tempfile.gettempdir()}: no space left .* checkpoint 1 .* set TMPDIR"),
    ):
        saver.save(FullDisk(error), state_at(1), {})
    assert list_checkpoints(Storage(), job.run_folder) == ()
    assert scratch_folders() <= before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_full_disk_error_of_torch_is_recognised():
    with pytest.raises(StorageError, match="no space left on the disk for weights"), report_full_disk("weights"):
        torch.save({"w": torch.zeros(10_000)}, "/dev/full")


def test_other_errors_while_saving_are_not_converted():
    with pytest.raises(RuntimeError, match="closed by peer"), report_full_disk("weights"):
        raise RuntimeError("Connection closed by peer")
