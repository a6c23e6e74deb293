"""`tracking.json` of a run folder: which MLflow run a restart continues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.data_pipeline.urls import without_secrets


@dataclass(frozen=True)
class RunRecord:
    """The MLflow run of a run folder, and what it began with."""

    uri: str
    run_id: str
    parameters: dict[str, str] | None
    """Settings by name; None where they are not known any more."""
    facts: dict[str, str] | None
    """Code and data; None in records of version 0.1, too."""
    lacks_evaluations: bool = False
    """Whether the run was made again, and the evaluations that the run folder holds are not on their way to it yet."""


def record_url(run_folder: str) -> str:
    """Where the record is stored."""
    return join(run_folder, "tracking.json")


def write_record(storage: Storage, run_folder: str, record: RunRecord) -> None:
    """Store the record."""
    storage.put(record_url(run_folder), json.dumps(asdict(record), indent=1).encode())


def record_evaluations(storage: Storage, run_folder: str) -> None:
    """Store that the evaluations of the run folder are in the journals of its MLflow run."""
    record = read_record(storage, run_folder)
    if record is not None and record.lacks_evaluations:
        write_record(storage, run_folder, replace(record, lacks_evaluations=False))


def read_record(storage: Storage, run_folder: str) -> RunRecord | None:
    """The record; None where there is none. Raises ValueError for one that is damaged.

    Earlier versions stored URLs with credentials, which are left out.
    """
    url = record_url(run_folder)
    if not storage.exists(url):
        return None
    content = parse_json(storage.get(url))
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    match content:
        case {"uri": str(uri), "run_id": str(run_id), "parameters": dict(parameters)}:
            facts = content.get("facts")
            known_facts = _texts(facts) if isinstance(facts, dict) else None
            lacks = content.get("lacks_evaluations") is True
            return RunRecord(without_secrets(uri), run_id, _texts(parameters), known_facts, lacks)
    raise ValueError("uri, run_id or parameters is missing")


def _texts(values: Mapping[object, object]) -> dict[str, str]:
    return {str(name): without_secrets(str(value)) for name, value in values.items()}
