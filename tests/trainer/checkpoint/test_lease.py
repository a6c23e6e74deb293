"""One writer per run folder: who may take the lease, and what a former holder is prevented from doing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.checkpoint import lease as lease_module
from m2f.trainer.checkpoint.folder import (
    MANIFEST,
    checkpoint_url,
    delete_old,
    folders_to_delete,
    list_checkpoints,
    newest_step,
    pin,
    read_manifest,
    verify_sizes,
)
from m2f.trainer.checkpoint.lease import LEASE_VARIABLE, Timing, acquire_lease, hold_lease
from m2f.trainer.checkpoint.lease_record import (
    LeaseRecord,
    check_lease,
    read_record,
    record_url,
    this_process,
)
from m2f.trainer.errors import CheckpointError, LeaseHeldError, LeaseLostError

QUICK = Timing(renew_s=0.1, poll_s=0.05, unchanged_s=1.0)
WRITER = Path(__file__).with_name("leased_writer.py")
KINDS = ("live", "stop", "outage", "partition", "kill")
OVERLAPS = int(os.environ.get("M2F_SOAK_OVERLAPS", "100"))


@pytest.fixture(params=["local", "s3"])
def run_folder(request, tmp_path) -> str:
    if request.param == "local":
        return str(tmp_path / "run")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}/run"


@pytest.fixture
def storage() -> Storage:
    return Storage()


def commit(storage: Storage, run_folder: str, step: int, lease: int = 0) -> str:
    url = checkpoint_url(run_folder, step, lease)
    content = {"version": 1, "step": step, "world_size": 1, "zero_stage": 0, "files": {}}
    storage.put(join(url, MANIFEST), json.dumps(content).encode())
    return url


def store_lease(storage: Storage, run_folder: str, number: int, holder=None, found=()) -> None:
    record = LeaseRecord(number, "nonce", holder or this_process(), tuple(found))
    storage.put(record_url(run_folder, number), record.to_json())


def holder_on_another_machine():
    return replace(this_process(), host="node-7", boot="another boot")


def steps(storage: Storage, run_folder: str) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(storage, run_folder)]


def test_a_contender_is_refused_while_the_holder_lives(storage, run_folder):
    with hold_lease(storage, run_folder, timing=QUICK) as lease:
        assert lease.number == 1
        with (
            pytest.raises(LeaseHeldError, match=rf"process {os.getpid()} on .* is training in this folder \(lease 1\)"),
            hold_lease(storage, run_folder, timing=QUICK),
        ):
            pass
    with hold_lease(storage, run_folder, timing=replace(QUICK, unchanged_s=1e9)) as lease:  # released: no wait
        assert lease.number == 2


def test_exactly_one_of_many_contenders_gets_the_lease(storage, run_folder):
    barrier, outcomes = threading.Barrier(8), []
    done = threading.Event()

    def contend() -> None:
        barrier.wait()
        try:
            with hold_lease(storage, run_folder, timing=replace(QUICK, unchanged_s=60.0)) as lease:
                outcomes.append(lease.number)
                done.wait(120)
        except LeaseHeldError:
            outcomes.append("refused")

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 120
    while len(outcomes) < 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(map(str, outcomes)) == ["1"] + 7 * ["refused"]


def test_holder_on_another_machine_that_stops_renewing_is_replaced(storage, run_folder):
    store_lease(storage, run_folder, 1, holder_on_another_machine())
    messages, started = [], time.monotonic()
    record = acquire_lease(storage, run_folder, messages.append, QUICK)
    assert time.monotonic() - started > QUICK.unchanged_s / 2
    assert record.number == 2
    assert "on node-7 to renew lease 1" in messages[0]


def test_holder_that_provably_ended_is_replaced_immediately(storage, run_folder):
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    holder = replace(this_process(), pid=ended.pid)  # a zombie until ended.wait()
    store_lease(storage, run_folder, 1, holder)
    while Path(f"/proc/{ended.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert acquire_lease(storage, run_folder, print, replace(QUICK, unchanged_s=1e9)).number == 2
    ended.wait()
    store_lease(storage, run_folder, 2, replace(this_process(), started="1"))  # the pid was reused
    assert acquire_lease(storage, run_folder, print, replace(QUICK, unchanged_s=1e9)).number == 3


def test_storage_outage_does_not_expire_a_lease(storage, run_folder, monkeypatch):
    real, started = Storage.get, time.monotonic()

    def get(self, url):
        if url.endswith(".beat") and time.monotonic() - started < 3 * QUICK.unchanged_s:
            raise StorageError(f"{url}: 503")
        return real(self, url)

    store_lease(storage, run_folder, 1, holder_on_another_machine())
    beats = iter(range(10_000))
    stop = threading.Event()

    def renew() -> None:  # the holder cannot write during the outage either
        while not stop.wait(0.1):
            if time.monotonic() - started > 3 * QUICK.unchanged_s + 0.3:
                storage.put(f"{record_url(run_folder, 1)}.beat", str(next(beats)).encode())

    monkeypatch.setattr(Storage, "get", get)
    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(LeaseHeldError, match="node-7"):
        acquire_lease(storage, run_folder, lambda line: None, QUICK)
    stop.set()
    thread.join()


def test_holder_detects_that_it_lost_the_lease(storage, run_folder):
    with hold_lease(storage, run_folder, timing=QUICK) as lease:
        store_lease(storage, run_folder, 2, holder_on_another_machine())
        with pytest.raises(LeaseLostError, match="node-7 took over this run with lease 2"):
            lease.check()
        lease._thread.join(120)  # the thread ends when it detects the loss
        with pytest.raises(LeaseLostError):
            lease.raise_if_lost()
    assert not storage.exists(f"{record_url(run_folder, 1)}.released")
    check_lease(storage, run_folder, 0)  # 0 means no lease, which cannot be lost


def test_late_commits_are_ignored(storage, run_folder):
    commit(storage, run_folder, 5)  # by a version without leases
    first = acquire_lease(storage, run_folder, print, QUICK)
    assert first.found == ("step_00000005",)
    commit(storage, run_folder, 10, lease=1)
    assert steps(storage, run_folder) == [10, 5]
    store_lease(storage, run_folder, 2, found=["step_00000005", "step_00000010-1"])
    commit(storage, run_folder, 15, lease=1)
    commit(storage, run_folder, 20)
    assert steps(storage, run_folder) == [10, 5]
    commit(storage, run_folder, 15, lease=2)
    assert list_checkpoints(storage, run_folder)[0].name == "step_00000015-2"
    assert newest_step(storage, run_folder) == 15
    assert acquire_lease(storage, run_folder, print, QUICK).found == (
        "step_00000015-2",
        "step_00000010-1",
        "step_00000005",
    )


def test_retention_ignores_late_commits_and_requires_the_lease(storage, run_folder):
    store_lease(storage, run_folder, 1)
    for step in (5, 10, 15):
        commit(storage, run_folder, step, lease=1)
    store_lease(storage, run_folder, 2, found=["step_00000005-1", "step_00000010-1", "step_00000015-1"])
    commit(storage, run_folder, 12, lease=1)  # late: it must not count towards `keep`
    commit(storage, run_folder, 20, lease=2)
    urls = storage.list(join(run_folder, "checkpoints"))
    assert folders_to_delete(urls, 15, 1, lease=0) == ()
    pin(storage, checkpoint_url(run_folder, 5, 1), "person")
    delete_old(storage, run_folder, 20, keep=3, lease=2)
    assert steps(storage, run_folder) == [20, 15, 10, 5]
    delete_old(storage, run_folder, 20, keep=2, lease=2)
    assert steps(storage, run_folder) == [20, 15, 5]
    store_lease(storage, run_folder, 3, found=["step_00000005-1", "step_00000015-1", "step_00000020-2"])
    with pytest.raises(LeaseLostError):
        delete_old(storage, run_folder, 20, keep=1, lease=2)


def test_child_process_uses_the_lease_of_its_parent(storage, run_folder, monkeypatch):
    with hold_lease(storage, run_folder, timing=QUICK) as parent:
        monkeypatch.setenv(LEASE_VARIABLE, parent.environment()[LEASE_VARIABLE])
        with hold_lease(storage, run_folder, timing=QUICK) as child:
            assert child.number == 1
        assert not storage.exists(f"{record_url(run_folder, 1)}.released")
        with hold_lease(storage, join(run_folder, "other"), timing=QUICK) as other:  # another folder's lease
            assert other.number == 1
            assert read_record(storage, join(run_folder, "other"), 1).nonce != parent.environment()[LEASE_VARIABLE][2:]


def test_unreadable_record_is_named_in_the_error(storage, run_folder):
    storage.put(record_url(run_folder, 1), b"{")
    with pytest.raises(CheckpointError, match=r"lease/000001 cannot be read .*delete its lease/ folder"):
        acquire_lease(storage, run_folder, print, QUICK)


class Writer:
    """A process that runs leased_writer.py."""

    def __init__(self, run_folder: str, last: int, pause_s: float, log: Path) -> None:
        self.log, self.outage = log, log.with_suffix(".outage")
        endpoint = [os.environ["AWS_ENDPOINT_URL"]] if "://" in run_folder else []
        command = [sys.executable, str(WRITER), run_folder, str(last), str(pause_s), str(self.outage), *endpoint]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def wait_for(self, word: str) -> None:
        deadline = time.monotonic() + 240
        while word not in self.log.read_text():
            assert time.monotonic() < deadline, f"{word!r} is not in: {self.log.read_text()}"
            time.sleep(0.02)

    def end(self) -> str:
        self.process.wait(240)
        return self.log.read_text()


@pytest.fixture
def writers(run_folder, tmp_path) -> Iterator[list[Writer]]:
    started: list[Writer] = []

    def start(last: int, pause_s: float = 0.02) -> Writer:
        started.append(Writer(run_folder, last, pause_s, tmp_path / f"writer{len(started)}.log"))
        return started[-1]

    yield start
    for writer in started:
        if writer.process.poll() is None:
            writer.process.kill()
        writer.process.wait()


def check_history(storage: Storage, run_folder: str, last: int) -> None:
    """Assert that every step is committed once and completely, by one lease, and continues from the step before it."""
    found = {checkpoint.step: checkpoint for checkpoint in list_checkpoints(storage, run_folder)}
    assert sorted(found) == list(range(1, last + 1))
    for step, checkpoint in found.items():
        verify_sizes(storage, checkpoint.url)
        contents = [
            json.loads(storage.get(join(checkpoint.url, name))) for name in read_manifest(storage, checkpoint.url).files
        ]
        assert len(contents) == 2
        assert all(content == contents[0] for content in contents)
        assert contents[0]["parent"] == step - 1
        assert checkpoint.name == f"step_{step:08d}-{contents[0]['lease']}"


@pytest.mark.parametrize(
    ("run_folder", "kind"),
    [
        ("local", "kill"),
        ("local", "stop"),
        ("s3", "outage"),
        ("s3", "partition"),
        pytest.param("local", "outage", marks=pytest.mark.soak),
        pytest.param("local", "partition", marks=pytest.mark.soak),
        pytest.param("s3", "kill", marks=pytest.mark.soak),
        pytest.param("s3", "stop", marks=pytest.mark.soak),
    ],
    indirect=["run_folder"],
)
def test_overlapping_writers_leave_one_history(storage, run_folder, writers, kind):
    overlap(storage, run_folder, writers, kind, random.Random(0), last=6)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(OVERLAPS))
def test_many_random_overlaps_leave_one_history(storage, tmp_path, number):
    run_folder = str(tmp_path / "run")
    started: list[Writer] = []

    def start(last: int, pause_s: float = 0.02) -> Writer:
        started.append(Writer(run_folder, last, pause_s, tmp_path / f"writer{len(started)}.log"))
        return started[-1]

    overlap(storage, run_folder, start, KINDS[number % 5], random.Random(number), 8)


def overlap(storage, run_folder, start, kind: str, rng: random.Random, last: int) -> None:
    """Start a second writer while the first runs, and disturb the first or the storage as `kind` says."""
    if kind == "partition":
        return overlap_partitioned(storage, run_folder, start, rng, last)
    first = start(last, 0.1)
    first.wait_for(f"committed {rng.randint(1, last - 2)}")
    time.sleep(rng.uniform(0, 0.2))  # a random point within a save
    if kind in ("live", "outage"):
        if kind == "outage":
            first.outage.touch()
        second = start(last)
        if kind == "outage":
            second.outage.touch()
            time.sleep(2.5)  # longer than a lease lasts without renewal
            for writer in (first, second):
                writer.outage.unlink()
        assert "LeaseHeldError" in second.end() or "finished" in first.end()
    else:
        first.process.send_signal(signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        second = start(last)
        second.wait_for("holds 2")
        if kind == "stop":
            time.sleep(rng.uniform(0, 0.2))
            first.process.send_signal(signal.SIGCONT)
            assert "LeaseLostError" in first.end()
        assert "finished" in second.end()
    first.process.wait(240)
    check_history(storage, run_folder, last)


def overlap_partitioned(storage, run_folder, start, rng: random.Random, last: int) -> None:
    """Run a worker whose driver died and whose storage fails; reconnect it after another driver finished the run."""
    store_lease(storage, run_folder, 1, holder_on_another_machine())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LEASE_VARIABLE, "1:nonce")
        worker = start(last, 0.1)
    worker.wait_for(f"committed {rng.randint(1, last - 2)}")
    worker.outage.touch()
    worker.wait_for("waits for the store")
    second = start(last)
    assert "finished" in second.end()
    worker.outage.unlink()
    assert "LeaseLostError" in worker.end()
    check_history(storage, run_folder, last)


def test_default_timing_refuses_a_contender_within_seconds():
    default = lease_module.Timing()
    assert default.renew_s + default.poll_s < 5.0
    assert default.unchanged_s >= 10 * default.renew_s
