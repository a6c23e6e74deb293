"""Resources that a run requests from Ray, and how many processes fit on given nodes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from m2f.cluster.recipe.config import RunConfig
from m2f.model.format_count import format_count


@dataclass(frozen=True)
class ResourceRequest:
    """Processes that must fit before a run can start."""

    purpose: str
    """`training` or `evaluation`."""
    count: int
    needs: Mapping[str, float]
    """Amount of each Ray resource that one process needs."""

    def __str__(self) -> str:
        each = ", ".join(f"{amount:g} {name}" for name, amount in self.needs.items())
        return f"{self.purpose}: {format_count(self.count, 'process', 'processes')} with {each} each"


def resource_requests(config: RunConfig) -> list[ResourceRequest]:
    """Return the requests of a run. If `cluster.num_workers` is a range, its minimum counts."""
    found = [ResourceRequest("training", config.cluster.min_workers, config.cluster.needs)]
    settings = config.evaluation
    if settings.sets:
        needs = {"CPU": settings.num_cpus_per_actor, "GPU": settings.gpus_per_actor, **settings.resources_per_actor}
        found.append(
            ResourceRequest("evaluation", settings.actors, {name: amount for name, amount in needs.items() if amount})
        )
    return found


def count_fitting(nodes: Iterable[Mapping[str, float]], needs: Mapping[str, float]) -> int:
    """Return how many processes fit into the free resources of the nodes.

    If `needs` is empty, or the node has an infinite amount of each, it has room for `sys.maxsize` processes.
    """

    def fitting(node: Mapping[str, float]) -> int:
        return int(min([sys.maxsize, *(node.get(name, 0.0) / amount + 1e-6 for name, amount in needs.items())]))

    return sum(map(fitting, nodes))


def joint_shortages(requests: Sequence[ResourceRequest], nodes: Sequence[Mapping[str, float]]) -> list[str]:
    """Return a message for every resource of which the requests together need more than the nodes have.

    Returns none if a request does not even fit alone, see `count_fitting`. Only totals are compared, so processes may
    still not fit on the single nodes.
    """
    if any(count_fitting(nodes, request.needs) < request.count for request in requests):
        return []
    needed: dict[str, float] = {}
    for request in requests:
        for name, amount in request.needs.items():
            needed[name] = needed.get(name, 0.0) + request.count * amount
    available = {name: sum(node.get(name, 0.0) for node in nodes) for name in needed}
    return [
        f"training and evaluation together need {amount:g} {name}, but the nodes have {available[name]:g}"
        for name, amount in needed.items()
        if amount > available[name] + 1e-6
    ]
