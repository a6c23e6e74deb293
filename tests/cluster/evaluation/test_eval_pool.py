import os
import signal
import time
from pathlib import Path

import pytest
import ray

from m2f.cluster.evaluation.pool import BatchLedger, EvaluationPool
from m2f.eval.errors import EvaluationError
from tests.waiting import wait_until


def test_batch_result_is_used_once():
    ledger = BatchLedger([0, 1])
    assert [ledger.take(idle=True), ledger.take(idle=False), ledger.take(idle=True)] == [0, 1, None]
    assert ledger.finish(0)
    assert not ledger.finish(0)  # a late duplicate
    assert not ledger.complete
    ledger.fail(0, "its answer came, then its actor died")
    assert ledger.finish(1)
    assert ledger.complete
    assert ledger.done == {0, 1}


def test_failed_batch_waits_for_an_idle_actor():
    ledger = BatchLedger([7])
    ledger.take(idle=True)
    ledger.fail(7, "died")
    assert ledger.take(idle=False) is None
    assert ledger.take(idle=True) == 7


def test_poison_batch_is_named_in_the_error():
    ledger = BatchLedger([7], max_attempts=2)
    ledger.take(idle=True)
    ledger.fail(7, "died")
    ledger.take(idle=True)
    with pytest.raises(EvaluationError, match="batch 7 failed 2 times, last error: ValueError: bad pixel"):
        ledger.fail(7, "ValueError: bad pixel")


class Squares:
    """Actor that returns the square of the batch number. Files in the folder make it die, hang or raise at a batch."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / f"pid_{os.getpid()}").touch()

    def ping(self) -> None:
        pass

    def process_id(self) -> int:
        return os.getpid()

    def evaluate(self, task: str, batch: int) -> bytes:
        time.sleep(0.02)
        if (self.folder / f"{task}_dies_{batch}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.folder / f"{task}_dies_once_{batch}").exists():
            (self.folder / f"{task}_dies_once_{batch}").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.folder / f"{task}_hangs_{batch}").exists():
            time.sleep(3600)
        if (self.folder / f"{task}_hangs_once_{batch}").exists():
            (self.folder / f"{task}_hangs_once_{batch}").unlink()
            time.sleep(3600)
        if (self.folder / f"{task}_raises_{batch}").exists():
            raise ValueError("bad pixel")
        return str(batch**2).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pool")


@pytest.fixture(scope="module")
def pool(folder):
    ray.init("local", num_cpus=4, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1)(Squares)
    pool = EvaluationPool(lambda: actor.remote(folder), size=2, hang_s=3)
    yield pool
    pool.close()
    ray.shutdown()


def results_of(pool: EvaluationPool, task: str, count: int) -> dict[int, bytes]:
    results: list[tuple[int, bytes]] = []
    pool.run(task, range(count), lambda batch, result: results.append((batch, result)))
    assert len(results) == len(dict(results)), "a result was taken twice"
    return dict(results)


@pytest.mark.cluster
def test_five_actor_deaths_do_not_change_results(pool, folder):
    expected = {batch: str(batch**2).encode() for batch in range(20)}
    assert results_of(pool, "calm", 20) == expected
    for batch in (3, 4, 7, 11, 15):
        (folder / f"storm_dies_once_{batch}").touch()
    assert results_of(pool, "storm", 20) == expected
    wait_until(lambda: len(list(folder.glob("pid_*"))) == 2 + 5)  # the last replacement may start late


@pytest.mark.cluster
def test_batch_that_kills_its_actor_fails_the_evaluation_and_the_pool_stays_usable(pool, folder):
    (folder / "poison_dies_5").touch()
    with pytest.raises(EvaluationError, match="batch 5 failed 3 times, last error: its actor died"):
        results_of(pool, "poison", 8)
    (folder / "error_raises_2").touch()
    with pytest.raises(EvaluationError, match="batch 2 failed 3 times, last error: ValueError: bad pixel"):
        results_of(pool, "error", 8)
    assert len(results_of(pool, "after", 8)) == 8


@pytest.mark.cluster
def test_hung_actor_is_replaced(pool, folder):
    expected = {batch: str(batch**2).encode() for batch in range(12)}
    for batch in (2, 9):
        (folder / f"stuck_hangs_once_{batch}").touch()
    assert results_of(pool, "stuck", 12) == expected
    assert results_of(pool, "calm", 12) == expected
    answers = pool.ask("process_id")
    assert 1 <= len(answers) <= 2
    assert all((folder / f"pid_{pid}").exists() for pid in answers)


@pytest.mark.cluster
def test_batch_on_which_actors_hang_is_named_in_the_error(pool, folder, monkeypatch):
    monkeypatch.setattr(pool, "_hang_s", 1.5)
    (folder / "tar_hangs_4").touch()
    with pytest.raises(
        EvaluationError, match=r"batch 4 failed 3 times, last error: its actor did not respond for 1\.5 s"
    ):
        results_of(pool, "tar", 6)
    assert len(results_of(pool, "after tar", 6)) == 6
