"""Why the ranks of an attempt ended without an error that says it: one object in the run folder per attempt."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from m2f.data_pipeline.errors import MissingObjectError
from m2f.data_pipeline.storage.storage import Storage, join


@dataclass(frozen=True)
class Ending:
    """Written by the rank that knows, read by the supervisor once no rank runs any more."""

    kind: Literal["stalled", "drained"]
    """stalled: the watchdog ended the ranks; drained: a machine is about to go away."""
    message: str


def write_ending(storage: Storage, run_folder: str, attempt: str, ending: Ending) -> None:
    """Store it; nothing for an attempt without a name, which nobody supervises."""
    if attempt:
        storage.put(_url(run_folder, attempt), json.dumps(asdict(ending)).encode())


def read_ending(storage: Storage, run_folder: str, attempt: str) -> Ending | None:
    """What a rank of the attempt wrote; None where none did."""
    try:
        return Ending(**json.loads(storage.get(_url(run_folder, attempt))))
    except MissingObjectError:
        return None


def _url(run_folder: str, attempt: str) -> str:
    return join(run_folder, "attempts", f"{attempt}.json")
