"""Environment variables that hold for a while, and whether there is a Ray cluster for this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


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


def uses_ray(address: str | None) -> bool:
    """Whether a Ray cluster is named, by `address` or RAY_ADDRESS, or this process is connected to one."""
    ray = sys.modules.get("ray")  # importing it takes a second
    return address is not None or "RAY_ADDRESS" in os.environ or (ray is not None and ray.is_initialized())
