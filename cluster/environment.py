"""Environment variables that hold for a while, whether there is a Ray cluster for this process, and its cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

OWN_CLUSTER = "M2F_OWN_CLUSTER"
"""Address of the Ray that was started on this machine for a while, beside RAY_ADDRESS, which says the same."""


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set these variables of this process during the block; then they are as before."""
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


def names_cluster(address: str | None) -> bool:
    """Whether `address` or RAY_ADDRESS names a Ray cluster that others started, which may get more nodes."""
    named = address or os.environ.get("RAY_ADDRESS")
    return named is not None and named != os.environ.get(OWN_CLUSTER)


def usable_cores() -> int:
    """Cores that this process may use; all of the machine on systems that do not say, such as macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def uses_ray(address: str | None) -> bool:
    """Whether a Ray cluster is named, by `address` or RAY_ADDRESS, or this process is connected to one."""
    ray = sys.modules.get("ray")  # importing it takes a second
    return address is not None or "RAY_ADDRESS" in os.environ or (ray is not None and ray.is_initialized())
