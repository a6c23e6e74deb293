"""Reason for the end of an attempt if no error states it: one object per attempt in the run folder."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.errors import MissingObjectError
from m2f.data_pipeline.storage.storage import Storage, join

Kind = Literal["stalled", "drained"]
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ending:
    """Reason for the end. A rank writes it; the supervisor reads it after all ranks have ended."""

    kind: Kind
    """stalled: the watchdog ended the ranks; drained: a machine is about to go away."""
    message: str


def write_ending(storage: Storage, run_folder: str, attempt: str, ending: Ending) -> None:
    """Store the ending. Does nothing for an attempt without a name, which no process supervises."""
    if attempt:
        storage.put(_url(run_folder, attempt), json.dumps(asdict(ending)).encode())


def read_ending(storage: Storage, run_folder: str, attempt: str) -> Ending | None:
    """Return the stored ending; None if it is missing or damaged, so that the exit codes decide."""
    url = _url(run_folder, attempt)
    try:
        data = storage.get(url)
    except MissingObjectError:
        return None
    try:
        content = parse_json(data)
        if content["kind"] in get_args(Kind):
            return Ending(content["kind"], str(content["message"]))
        LOGGER.warning(f"{url} has unknown kind {content['kind']!r}; using the exit codes of the processes instead")
    except (ValueError, TypeError, KeyError) as error:
        LOGGER.warning(f"{url} cannot be read ({error}); using the exit codes of the processes instead")
    return None


def _url(run_folder: str, attempt: str) -> str:
    return join(run_folder, "attempts", f"{attempt}.json")
