"""Temporary environment variables, detection of a Ray cluster, and the number of usable CPU cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

OWN_CLUSTER_VARIABLE = "M2F_OWN_CLUSTER"
"""Environment variable with the address of the local Ray cluster that m2f started. RAY_ADDRESS has the same value."""


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process during the block and restore their previous values afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def is_external_cluster(address: str | None) -> bool:
    """Return whether `address` or RAY_ADDRESS names a cluster that m2f did not start and that may gain nodes."""
    named = address or os.environ.get("RAY_ADDRESS")
    return named is not None and named != os.environ.get(OWN_CLUSTER_VARIABLE)


def usable_cores() -> int:
    """Return the number of cores that this process may use.

    On systems without CPU affinity, such as macOS, that is every core of the machine.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def uses_ray(address: str | None) -> bool:
    """Return whether `address` or RAY_ADDRESS names a Ray cluster, or this process is connected to one."""
    ray = sys.modules.get("ray")  # Ray is not imported for this, because that takes a second
    return address is not None or "RAY_ADDRESS" in os.environ or (ray is not None and ray.is_initialized())
