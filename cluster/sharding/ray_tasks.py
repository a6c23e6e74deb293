"""Write shards with Ray: one task per shard, with a bounded number of running tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import ray
from ray.exceptions import RayError, RayTaskError

from m2f.cluster.sharding.report import ShardFailure, ShardJobError
from m2f.cluster.terminal import first_line
from m2f.data_pipeline.readers import Reader
from m2f.data_pipeline.shards.plan import ShardPlan
from m2f.data_pipeline.shards.write import ShardPart, write_shard
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.errors import UserError

TASK_RETRIES = 3
"""Times that Ray repeats a task whose worker died, for example from lack of memory. Errors of data are not repeated."""


def run_tasks(
    reader: Reader, plan: ShardPlan, missing: Sequence[int], storage: Storage, max_running: int, keep_going: bool
) -> Iterator[ShardPart | ShardFailure]:
    """Write the missing shards, at most `max_running` at once, and yield their parts in the order in which they finish.

    If a shard fails with a UserError, raises it, or with `keep_going` yields a ShardFailure.
    """
    position = {key: index for index, key in enumerate(reader.keys)}
    plan_ref = ray.put(plan)
    waiting = list(reversed(missing))
    running: dict[ray.ObjectRef, int] = {}
    while waiting or running:
        while waiting and len(running) < max_running:
            index = waiting.pop()
            samples = reader.subset([position[key] for key in plan.shard_keys[index]])  # keeps task arguments small
            running[_write_shard_task.remote(samples, plan_ref, index, storage)] = index
        done, _ = ray.wait(list(running), num_returns=1)
        index = running.pop(done[0])
        try:
            part: ShardPart | ShardFailure = _task_result(done[0], index, plan)
        except UserError as error:
            if not keep_going:
                raise
            part = ShardFailure(index, str(error))
        yield part


@ray.remote(num_cpus=1, max_retries=TASK_RETRIES, scheduling_strategy="SPREAD")
def _write_shard_task(samples: Reader, plan: ShardPlan, index: int, storage: Storage) -> ShardPart:
    return write_shard(samples, plan, index, storage)


def _task_result(ref: ray.ObjectRef, index: int, plan: ShardPlan) -> ShardPart:
    """Return the part that a task wrote. Raises the task's UserError, or ShardJobError if its workers died."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except RayError as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ShardJobError(
            f"{plan.target}: shard {index:05d} failed {TASK_RETRIES + 1} times: {reason}. "
            "If workers run out of memory, lower cluster.shard_tasks or datasets.<name>.shard_mb. Finished shards are "
            "kept; run again to write the rest"
        ) from error
