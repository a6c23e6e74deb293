"""Functions of Ray's private modules that tests use, with the versions in `m2f.cluster.ray_private.TESTED_VERSIONS`."""

from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError as WorkerGroupStartupTimeoutError


def announce_preemption(address: str, node_id: str, deadline: float) -> bool:
    """Tell Ray that a node will be preempted at `deadline` (Unix time), as a cloud's notice does.

    Return whether Ray accepts it.
    """
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, _ = GcsClient(address=address).drain_node(node_id, reason, "spot", int(deadline * 1000))
    return accepted
