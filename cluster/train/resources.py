"""Whether a run has room on some nodes, as Ray counts it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from m2f.cluster.recipe.config import RunConfig
from m2f.model.counted import counted


@dataclass(frozen=True)
class ResourceRequest:
    """Processes that a run cannot start without."""

    purpose: str
    """training or evaluation"""
    count: int
    needs: Mapping[str, float]
    """Ray resources of one process."""

    def __str__(self) -> str:
        each = ", ".join(f"{amount:g} {name}" for name, amount in self.needs.items())
        return f"{self.purpose}: {counted(self.count, 'process', 'processes')} with {each} each"


def resource_requests(config: RunConfig) -> list[ResourceRequest]:
    """What the run asks for; of a range of workers the least."""
    found = [ResourceRequest("training", config.cluster.min_workers, config.cluster.needs)]
    settings = config.evaluation
    if settings.sets:
        needs = {"CPU": settings.num_cpus_per_actor, "GPU": settings.gpus_per_actor, **settings.resources_per_actor}
        found.append(
            ResourceRequest("evaluation", settings.actors, {name: amount for name, amount in needs.items() if amount})
        )
    return found


def count_fitting(nodes: Iterable[Mapping[str, float]], needs: Mapping[str, float]) -> int:
    """How many processes the free resources of these nodes hold: any number of those that need nothing."""

    def fitting(node: Mapping[str, float]) -> int:
        return min((int(node.get(name, 0.0) / amount + 1e-6) for name, amount in needs.items()), default=sys.maxsize)

    return sum(map(fitting, nodes))
