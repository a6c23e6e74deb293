import pytest

from m2f.cluster.evaluation.choice import best_step
from m2f.cluster.train.failure_policy import (
    Attempt,
    AttemptHistory,
    Failure,
    Retry,
    Stop,
    decide,
    root_cause,
)
from m2f.data_pipeline.errors import LoaderDiedError, OutageError, StorageError
from m2f.trainer.errors import LossSpikeError, OutOfMemoryError, PeersError, TrainingError
from m2f.trainer.job import PositionRange
from m2f.trainer.recovery.adjustments import SkipPositions, SmallerMicroBatch


def history(*attempts: tuple[str, int], start: int = 0, message: str = "m{}") -> AttemptHistory:
    failed_attempts = [Attempt(Failure(0, kind, message.format(i)), step) for i, (kind, step) in enumerate(attempts)]  # type: ignore[arg-type]
    return AttemptHistory(start, tuple(failed_attempts))


class ActorDiedError(Exception):
    __module__ = "ray.exceptions"
    preempted = False


class HealthCheckFailed(Exception):
    __module__ = "ray.train.v2"

    def __init__(self, failure: Exception):
        self.health_check_failure = failure


@pytest.mark.parametrize(
    ("errors", "rank", "kind"),
    [
        ({0: RuntimeError("[gloo] Connection reset by peer"), 1: ValueError("bad")}, 1, "mistake"),
        (
            {0: RuntimeError("Connection closed by peer [x]"), 1: HealthCheckFailed(ActorDiedError())},
            1,
            "death",
        ),
        ({1: TrainingError("step 3"), 0: TypeError("x")}, 0, "mistake"),
        ({0: PeersError("rank 1: StorageError: x"), 1: StorageError("x")}, 1, "error"),
        ({0: StorageError("s3://b/k: timed out")}, 0, "error"),
        ({0: PeersError("rank 1: OutageError: x"), 1: OutageError("s3://b/k: no answer")}, 1, "outage"),
        ({0: LoaderDiedError("killed")}, 0, "death"),
        ({0: RuntimeError("CUDA error: unspecified launch failure")}, 0, "error"),
        ({0: RuntimeError("Connection reset by peer"), 1: RuntimeError("Connection closed by peer")}, None, "death"),
    ],
)
def test_root_cause_is_the_lowest_rank_without_a_collateral_failure(errors, rank, kind):
    failure = root_cause(errors)
    assert (failure.rank, failure.kind) == (rank, kind)


def test_preemption_takes_precedence_as_root_cause():
    lost = ActorDiedError("node gone")
    lost.preempted = True
    assert root_cause({0: ValueError("late"), 1: HealthCheckFailed(lost)}).kind == "preemption"


def test_mistake_stops_the_run():
    assert isinstance(decide(history(("mistake", 10)), max_failures=3), Stop)


def test_outage_stops_the_run():
    assert isinstance(decide(history(("outage", 10)), max_failures=3), Stop)


def test_deaths_are_retried_with_backoff_up_to_max_failures():
    deaths = [("death", 0)] * 4
    decisions = [decide(history(*deaths[:n]), max_failures=3) for n in range(1, 5)]
    assert [d.delay_s for d in decisions if isinstance(d, Retry)] == [1.0, 2.0, 4.0]
    assert isinstance(decisions[3], Stop)
    assert "max_failures" in decisions[3].reason


def test_new_checkpoint_resets_the_failure_count():
    failures = [("death", 4)] * 3
    assert isinstance(decide(history(*failures, start=4), max_failures=2), Stop)
    assert isinstance(decide(history(*failures, ("death", 8), start=4), max_failures=2), Retry)
    # The failed attempt that wrote the checkpoint is the first one in the new count.
    assert isinstance(decide(history(*failures, ("death", 8), ("death", 8), start=4), max_failures=2), Retry)
    assert isinstance(
        decide(history(*failures, ("death", 8), ("death", 8), ("death", 8), start=4), max_failures=2), Stop
    )


def test_error_stops_the_run_when_it_repeats_without_progress():
    assert isinstance(decide(history(("error", 0)), max_failures=3), Retry)
    assert isinstance(decide(history(("error", 0), ("error", 0)), max_failures=3), Retry)
    assert isinstance(decide(history(("error", 0), ("error", 0), message="same"), max_failures=3), Stop)
    assert isinstance(decide(history(("error", 0), ("error", 5), message="same"), max_failures=3), Retry)


def test_preemptions_do_not_count_as_failures():
    preemptions = [("preemption", 0)] * 20
    assert decide(history(*preemptions), max_failures=0) == Retry(0.0, "the node was preempted")
    assert isinstance(decide(history(*preemptions, ("death", 0)), max_failures=1), Retry)


def test_lack_of_resources_does_not_count_as_failure():
    for no_resources in (history(*[("resources", 0)] * 20), history(("death", 0), ("resources", 0))):
        assert decide(no_resources, max_failures=1) == Retry(
            0.0, "the cluster had too few free resources for the workers"
        )
    assert isinstance(decide(history(*[("resources", 0)] * 20, ("death", 0)), max_failures=1), Retry)


def test_max_failures_0_stops_at_the_first_death():
    assert isinstance(decide(history(("death", 100)), max_failures=0), Stop)


def test_out_of_memory_halves_the_micro_batch_down_to_one_image():
    def full(size):
        failure = root_cause({0: RuntimeError("Connection reset by peer"), 1: OutOfMemoryError("full", size)})
        return decide(AttemptHistory(0, (Attempt(failure, 0),)), max_failures=0)

    assert full(5).change == SmallerMicroBatch(2)
    assert "2 images per micro-batch instead of 5" in full(5).reason
    assert isinstance(full(1), Stop)
    assert "does not fit into memory" in full(1).reason


def test_loss_spike_skips_its_samples_and_counts_as_failure():
    failure = root_cause({rank: LossSpikeError("high", 8, 16) for rank in (0, 1)})
    once = AttemptHistory(0, (Attempt(failure, 4),))
    assert decide(once, max_failures=1).change == SkipPositions(PositionRange(8, 16))
    assert isinstance(decide(once.after(Attempt(failure, 4)), max_failures=1), Stop)


def test_best_step_is_the_earliest_with_the_highest_value():
    metrics = {4: {"val/PQ": 10.0}, 8: {"val/PQ": 30.0, "val/AP": 1.0}, 12: {"val/PQ": 30.0}, 16: {}}
    assert best_step(metrics, "val/PQ") == 8
    assert best_step(metrics, "val/AP") == 8
    assert best_step(metrics, "val/mIoU") is None
