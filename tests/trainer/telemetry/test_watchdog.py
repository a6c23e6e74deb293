import json
from dataclasses import replace

import pytest
import torch.distributed as dist

from m2f.trainer.ranks import Ranks
from m2f.trainer.reporting import STALL_EXIT
from m2f.trainer.telemetry.phases import DevicePhases, PhaseClock
from m2f.trainer.telemetry.watchdog import COLLECTIVE_PATHS, RankStacks, describe_stall

WAITING = RankStacks(
    rank=0, host="a", count=7, phase="exchange", seconds=9.0, in_collective=True, place="ranks.py:82", stacks=""
)
SLOW = replace(WAITING, rank=1, host="b", count=6, phase="data", in_collective=False, place="loader.py:5 in get: x()")


def test_rank_with_the_least_progress_is_named():
    assert describe_stall([WAITING, SLOW, replace(WAITING, rank=2)], 3) == (
        "training stalled: rank 1 on b has been in `data` for 9 s at loader.py:5 in get: x(); ranks 0, 2 waited"
    )


def test_ranks_waiting_for_others_are_not_blamed_for_a_stall():
    found = [replace(WAITING, count=6, phase="backward"), replace(SLOW, phase="backward")]
    assert "rank 1 on b has been in `backward`" in describe_stall(found, 2)
    assert describe_stall(found, 2).endswith("; rank 0 waited")


def test_rank_that_does_not_respond_is_named_as_the_cause():
    assert describe_stall([WAITING], 2) == "training stalled: rank 1 did not respond; rank 0 waited"


@pytest.mark.parametrize("wait", [Ranks.exchange, Ranks.gather, dist.all_reduce.__wrapped__])
def test_code_that_waits_for_other_ranks_is_recognised(wait):
    assert any(path in wait.__code__.co_filename for path in COLLECTIVE_PATHS)


def test_the_clock_adds_up_phases_and_counts_them():
    clock = PhaseClock()
    for phase in ("data", "forward", "backward", "forward", "backward", "update"):
        clock.enter(phase)
    assert clock.mark.count == 6
    assert list(clock.lap()) == ["start", "data", "forward", "backward"]
    clock.enter("data")
    assert list(clock.lap()) == ["update"]


class FakeEvent:
    """Device event. The device has completed the first `done` events, which are 10 ms apart."""

    made, done = 0, 0

    def record(self):
        self.number = FakeEvent.made
        FakeEvent.made += 1

    def query(self):
        return self.number < FakeEvent.done

    def elapsed_time(self, end):
        return 10.0 * (end.number - self.number)


def test_gpu_phases_are_timed_by_events_without_waiting():
    FakeEvent.made = FakeEvent.done = 0
    clock = PhaseClock(DevicePhases(FakeEvent))
    for phase in ("data", "forward", "backward", "forward"):
        clock.enter(phase)
    assert clock.lap() == {}
    FakeEvent.done = 3
    assert clock.lap() == {"start": 0.01, "data": 0.01}
    clock.enter("update")
    FakeEvent.done = 6
    assert clock.lap() == {"forward": 0.02, "backward": 0.01}
    assert clock.mark.phase == "update"


@pytest.mark.slow
def test_sleeping_rank_ends_the_attempt_with_the_stacks_of_all_ranks(launcher, training_shards):
    codes, outputs = launcher.run("stalled")
    assert codes == [STALL_EXIT, STALL_EXIT], outputs
    events = [json.loads(line) for line in (launcher.folder / "stalled.events").read_text().splitlines()]
    kind, step, message = events[-1]
    assert (kind, step) == ("stalled", 2)
    assert "rank 1 on " in message
    assert "has been in `data` for" in message
    assert "in fall_asleep: time.sleep(600)" in message
    assert "rank 0 waited" in message
    (stacks,) = (launcher.folder / "stalled" / "failures").glob("stall-*/stacks.txt")
    assert str(stacks) in message
    text = stacks.read_text()
    assert text.index("==== rank 0 on") < text.index("==== rank 1 on")
    assert "all_reduce" in text.split("==== rank 1")[0]
    assert "fall_asleep" in text.split("==== rank 1")[1]
