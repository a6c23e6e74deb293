"""`tracking.json` of a run folder, which records the MLflow run that a restart continues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.data_pipeline.urls import without_secrets


@dataclass(frozen=True)
class RunRecord:
    """The MLflow run of a run folder, with the settings, code and data of its first start."""

    uri: str
    run_id: str
    parameters: dict[str, str] | None
    """Settings by name; None if they are no longer known."""
    facts: dict[str, str] | None
    """Commit of the code and fingerprints of the data; None if unknown, as in records of version 0.1."""
    lacks_evaluations: bool = False
    """Whether the MLflow run was created again and the run folder's evaluations are not yet queued for it."""


def record_url(run_folder: str) -> str:
    """Return the path or URL of the file in the run folder that stores the `RunRecord`."""
    return join(run_folder, "tracking.json")


def write_record(storage: Storage, run_folder: str, record: RunRecord) -> None:
    """Store the record in the run folder."""
    storage.put(record_url(run_folder), json.dumps(asdict(record), indent=1).encode())


def record_evaluations(storage: Storage, run_folder: str) -> None:
    """Record that the evaluations of the run folder are in the journals of its MLflow run."""
    record = read_record(storage, run_folder)
    if record is not None and record.lacks_evaluations:
        write_record(storage, run_folder, replace(record, lacks_evaluations=False))


def read_record(storage: Storage, run_folder: str) -> RunRecord | None:
    """Return the record; None if there is none. Raises ValueError if it is damaged.

    Credentials in URLs, which earlier versions stored, are removed.
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
            known_facts = _to_texts(facts) if isinstance(facts, dict) else None
            lacks = content.get("lacks_evaluations") is True
            return RunRecord(without_secrets(uri), run_id, _to_texts(parameters), known_facts, lacks)
    raise ValueError("uri, run_id or parameters is missing")


def _to_texts(values: Mapping[object, object]) -> dict[str, str]:
    return {str(name): without_secrets(str(value)) for name, value in values.items()}
