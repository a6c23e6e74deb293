"""MLflow, written so that it can never hold up or end a training run.

Every point goes to a journal file first and is sent from there by a thread; while the tracking server is away the
journal grows, and it is replayed when the server answers or when the run is continued. Steps that the server already
has are not sent again, so the curves of a resumed run have one point per step. MlflowClient only: the fluent API marks
a run FINISHED when any of its users leaves.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException, RestException

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import dump_recipe, flatten
from m2f.cluster.tracking.journal import Entry, Journal
from m2f.cluster.tracking.provenance import DataInput, code_facts, data_facts, data_inputs
from m2f.data_pipeline.config import StorageConfig
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.errors import UserError
from m2f.trainer.checkpoint.lease_record import check_lease
from m2f.trainer.errors import LeaseLostError

LOGGER = logging.getLogger(__name__)
RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

MAX_PARAM_CHARS = 6000
PARAMS_PER_CALL = 100
METRICS_PER_CALL = 1000
ENTRIES_PER_READ = 200
MAX_PAUSE_S = 60.0
_RUN_JOURNAL = re.compile(r"(?:driver|rank0|evaluation)(?:-(\d+))?\.jsonl")
_NOT_ALLOWED = re.compile(r"[^\w\-. /:]", re.ASCII)
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}


class TrackingError(UserError):
    """The tracking store cannot be used. Names its URI, the cause and the remedy."""


@dataclass(frozen=True)
class RunLease:
    """The lease of a run folder, as far as another process must know it to stop in time."""

    run_folder: str
    number: int
    storage: StorageConfig


@dataclass(frozen=True)
class TrackedRun:
    """All that another process needs to write to the same MLflow run."""

    uri: str
    run_id: str
    spool: str
    """Local folder of the journals."""
    lease: RunLease | None = None
    """Under which the run is written; None for a process that only adds results of its own."""

    def journal(self, writer: str) -> Path:
        """File of one writer's journal; a holder whose lease is outdated writes to another file than the next one."""
        return Path(self.spool) / (f"{writer}-{self.lease.number}.jsonl" if self.lease else f"{writer}.jsonl")


def create_run(config: RunConfig, lease: int = 0) -> TrackedRun:
    """Make the MLflow run of this run folder, or continue the one that `tracking.json` names. Only the driver calls it.

    Its inputs are the data sets with their fingerprints; its tags name the commit of the code. Continuing contacts no
    server; settings, code and data that changed since are written as tags `resumed.<setting>`. Under a `lease`, what
    holders of earlier leases could not send is sent with what this one writes.

    Raises:
        TrackingError: the store cannot be reached or refuses the run. Only at the first start: later outages wait.
    """
    uri, spool, parameters = tracking_uri(config), _spool_folder(config), flatten(config)
    storage = Storage(config.storage)
    inputs = data_inputs(config, storage)
    facts = code_facts() | data_facts(inputs)
    known = _read_record(config)
    held = RunLease(config.run_folder, lease, config.storage) if lease else None
    if known is not None and known["uri"] == uri:
        run = TrackedRun(uri=uri, run_id=known["run_id"], spool=spool, lease=held)
        if lease:
            _adopt_journals(run, lease - 1)
        _note_resume(run, known["parameters"] | known.get("facts", facts), parameters | facts)
        return run
    run_id = _start_run(config, uri, parameters, facts, inputs)
    run = TrackedRun(uri=uri, run_id=run_id, spool=spool, lease=held)
    content = {"uri": run.uri, "run_id": run.run_id, "parameters": parameters, "facts": facts}
    storage.put(_record_url(config), json.dumps(content, indent=1).encode())
    return run


def find_run(config: RunConfig) -> TrackedRun | None:
    """The MLflow run of this run folder, to add to it; None where there is none."""
    known = _read_record(config)
    return None if known is None else TrackedRun(uri=known["uri"], run_id=known["run_id"], spool=_spool_folder(config))


def tracking_uri(config: RunConfig) -> str:
    """The recipe's tracking.uri, else MLFLOW_TRACKING_URI, else sqlite in the run folder."""
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None and "://" in config.run_folder:
        raise TrackingError(
            f"output is {config.output}, where no sqlite file can be: set tracking.uri or MLFLOW_TRACKING_URI"
        )
    if uri is not None and re.search(r"://[^/@\s]+:[^/@\s]+@", uri):
        raise TrackingError(
            "the tracking URI holds a password, which would be stored with the run: "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, or what the database's own client "
            "reads (PGPASSWORD or ~/.pgpass, ~/.my.cnf)"
        )
    return uri or f"sqlite:///{Path(config.run_folder).resolve() / 'mlflow.db'}"


class Tracking:
    """Writes one process's metrics to an MLflow run. Only `close` and `finish` wait, and no method raises.

    `writer` names the journal ("driver", "rank0", "evaluation"): one living process per name.
    """

    def __init__(self, run: TrackedRun, writer: str, interval_s: float = 2.0) -> None:
        self._run = run
        self._journal = Journal(run.journal(writer))
        self._sender = _Sender(run, self._journal)
        self._interval_s = interval_s
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._disk_refused = False
        self._thread = threading.Thread(target=self._send_all, name=f"tracking-{writer}", daemon=True)
        self._thread.start()

    def log_metrics(self, step: int, values: Mapping[str, float], replaces: bool = False) -> None:
        """Values at an optimizer step.

        What the store has of a step stays, unless the values replace it: MLflow then shows these, as they are younger.
        """
        points = {_key(name): float(value) for name, value in values.items()}
        entry: Entry = {"step": step, "time_ms": time.time_ns() // 1_000_000, "metrics": points}
        self._append(entry | {"replaces": True} if replaces else entry)

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """A local file, or a folder with all it holds, under `folder` of the run. It is read when it is sent."""
        self._append({"artifact": str(Path(path).resolve()), "folder": folder})

    def set_tag(self, name: str, value: str) -> None:
        """A tag of the run; the last value stands."""
        self._append({"tag": _key(name), "value": value[:MAX_PARAM_CHARS]})

    def finish(self, status: RunStatus, timeout_s: float = 60.0) -> bool:
        """The run has ended: send what waits, here and in journals that other processes left, and close."""
        if self._run.lease is not None:
            _adopt_journals(self._run, self._run.lease.number)
        self._append({"status": status})
        sent = self.close(timeout_s)
        for path in sorted(Path(self._run.spool).glob("*.jsonl")) if sent else ():
            left = Tracking(replace(self._run, lease=None), path.stem, self._interval_s)
            sent = left.close(timeout_s) and sent
        return sent

    def abandon(self) -> None:
        """Another process has taken the run over: send nothing more; the journal is left to that process."""
        self._sender.stop()
        self._deadline = 0.0  # also where the store does not answer
        self._closing.set()
        self._thread.join()

    def close(self, timeout_s: float = 30.0) -> bool:
        """Send what waits, for at most `timeout_s`; whether all went out. What did not stays in the journal."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s + 1.0)
        if self._thread.is_alive() or self._journal.read(1):
            LOGGER.warning(
                f"tracking: {self._run.uri} does not take the last points of run {self._run.run_id} "
                f"({self._sender.trouble or 'it is slow'}); they wait in {self._journal.path} "
                "and are sent when the run is continued"
            )
            return False
        if not self._sender.refused:
            self._journal.remove()
        return True

    def _append(self, entry: Entry) -> None:
        try:
            self._journal.append(entry)
        except OSError as error:
            if not self._disk_refused:
                LOGGER.warning(f"tracking: cannot write {self._journal.path} ({error}); points are lost until it can")
            self._disk_refused = True

    def _send_all(self) -> None:
        pause_s = self._interval_s
        while True:
            is_closing = self._closing.is_set()  # asked first: what was appended before `close` is sent
            more = self._sender.send_some()
            if self._sender.trouble:
                pause_s = min(MAX_PAUSE_S, pause_s * 2)
            elif more:
                continue
            else:
                pause_s = self._interval_s
            if is_closing:
                if not self._sender.trouble or time.monotonic() > self._deadline:
                    return
                time.sleep(min(pause_s, 1.0))
            else:
                self._closing.wait(pause_s)


class _Sender:
    """Sends journal entries to the store, in order, each point once."""

    def __init__(self, run: TrackedRun, journal: Journal) -> None:
        self._run, self._journal = run, journal
        self._client: MlflowClient | None = None
        self._latest: dict[str, int] | None = None
        """Last step per key that the store has; None = to be asked (at the start and after every failure)."""
        self._steps: dict[str, set[int]] = {}
        """All steps of the keys that were behind `_latest`."""
        self.trouble = ""
        """Why the last attempt failed; "" when it did not."""
        self.refused = 0
        """Entries that the store will never take."""
        self._storage = Storage(run.lease.storage) if run.lease is not None else None
        self._stopped = False

    def stop(self) -> None:
        """Send nothing more."""
        self._stopped = True

    def send_some(self) -> bool:
        """Send a batch of waiting entries and commit them; False when none waits or the store does not answer."""
        try:
            if not self._may_send():
                return False
            entries = self._journal.read(ENTRIES_PER_READ)
            while entries:
                entries = self._send_group(entries)
                self._note_recovery()
                if not entries:
                    return True
        except Exception as error:  # whatever a store, a driver or a proxy may raise: training goes on
            self._latest = None
            if not self.trouble:
                LOGGER.warning(f"tracking: {self._run.uri} does not answer ({_brief(error)}); points wait on disk")
            self.trouble = _brief(error)
        return False

    def _may_send(self) -> bool:
        """Whether the run is still this process's to write."""
        lease = self._run.lease
        if lease is not None and self._storage is not None and not self._stopped:
            try:
                check_lease(self._storage, lease.run_folder, lease.number)
            except LeaseLostError:
                self._stopped = True
        return not self._stopped

    def _send_group(self, entries: list[tuple[Entry, int]]) -> list[tuple[Entry, int]]:
        """Send the first entry, or all metrics up to the next entry of another kind; returns the rest."""
        count = 1
        if "metrics" in entries[0][0]:
            count = next((i for i, (entry, _) in enumerate(entries) if "metrics" not in entry), len(entries))
        group, rest = entries[:count], entries[count:]
        try:
            self._send([entry for entry, _ in group])
        except MlflowException as error:
            if not _is_refusal(error, self._run.uri):
                raise
            self._latest = None
            self.refused += len(group)
            LOGGER.warning(
                f"tracking: {self._run.uri} refuses {len(group)} entries ({_brief(error)}); "
                f"they stay in {self._journal.path}"
            )
        self._journal.commit(group[-1][1])
        return rest

    def _send(self, group: list[Entry]) -> None:
        client, run_id, first = self._connect(), self._run.run_id, group[0]
        if "metrics" in first:
            points = self._new_points(client, group)
            for start in range(0, len(points), METRICS_PER_CALL):
                client.log_batch(run_id, points[start : start + METRICS_PER_CALL])
            self._note_sent(points)
        elif "artifact" in first:
            path, folder = first["artifact"], first["folder"] or None
            if os.path.isdir(path):
                client.log_artifacts(run_id, path, folder)
            elif os.path.exists(path):
                client.log_artifact(run_id, path, folder)
            else:
                LOGGER.warning(f"tracking: {path} is gone, so it is not stored with the run")
        elif "tag" in first:
            client.set_tag(run_id, first["tag"], first["value"])
        elif first["status"] == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        else:
            client.set_terminated(run_id, first["status"])

    def _new_points(self, client: MlflowClient, group: list[Entry]) -> list[Metric]:
        """The points of these entries whose step the store does not have for that key, each once."""
        if self._latest is None:
            self._steps.clear()
            metrics = client.get_run(self._run.run_id).data.to_proto().metrics
            self._latest = {metric.key: metric.step for metric in metrics}
        points: dict[tuple[str, int], Metric] = {}
        for entry in group:
            step = entry["step"]
            for key, value in entry["metrics"].items():
                metric = Metric(key, value, entry["time_ms"], step)
                if entry.get("replaces"):
                    points[key, step] = metric
                elif not self._has(client, key, step):
                    points.setdefault((key, step), metric)
        return list(points.values())

    def _has(self, client: MlflowClient, key: str, step: int) -> bool:
        assert self._latest is not None
        if step > self._latest.get(key, -1):
            return False
        if key not in self._steps:
            self._steps[key] = {metric.step for metric in client.get_metric_history(self._run.run_id, key)}
        return step in self._steps[key]

    def _note_sent(self, points: list[Metric]) -> None:
        assert self._latest is not None
        for point in points:
            self._latest[point.key] = max(point.step, self._latest.get(point.key, -1))
            if point.key in self._steps:
                self._steps[point.key].add(point.step)

    def _connect(self) -> MlflowClient:
        if self._client is None:
            self._client = connect(self._run.uri)
        return self._client

    def _note_recovery(self) -> None:
        if self.trouble:
            LOGGER.warning(f"tracking: {self._run.uri} answers again; the waiting points are being sent")
        self.trouble = ""


def _record_url(config: RunConfig) -> str:
    return join(config.run_folder, "tracking.json")


def _read_record(config: RunConfig) -> dict[str, Any] | None:
    storage, url = Storage(config.storage), _record_url(config)
    return json.loads(storage.get(url)) if storage.exists(url) else None


def _start_run(
    config: RunConfig, uri: str, parameters: Mapping[str, str], facts: Mapping[str, str], inputs: Sequence[DataInput]
) -> str:
    """Create the run with its parameters, tags, inputs and recipe; returns its id."""
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        client = connect(uri)
        tags = {"m2f.run_folder": config.run_folder, "m2f.version": version("m2f"), **facts}
        if "code.commit" in facts:
            tags["mlflow.source.git.commit"] = facts["code.commit"]  # shown as the version of the run
        run_id = client.create_run(_experiment(client, config, uri), run_name=config.name, tags=tags).info.run_id
        params = [Param(_key(key)[:250], _shortened(value)) for key, value in parameters.items()]
        for start in range(0, len(params), PARAMS_PER_CALL):
            client.log_batch(run_id, params=params[start : start + PARAMS_PER_CALL])
        client.log_inputs(run_id, [_dataset_input(entry) for entry in inputs])
        client.log_text(run_id, dump_recipe(config), "recipe.yaml")
    except Exception as error:
        raise TrackingError(
            f"cannot create an MLflow run at {uri}: {_brief(error)}. Start the server, correct tracking.uri or "
            "MLFLOW_TRACKING_URI, or leave both unset for a sqlite file in the run folder"
        ) from error
    return run_id


def _dataset_input(entry: DataInput) -> DatasetInput:
    """As MLflow keeps it; its digests have at most 36 characters, the whole fingerprint is in the profile."""
    source = json.dumps({"uri": entry.url})
    dataset = Dataset(entry.name, entry.fingerprint[:36], "m2f", source, profile=entry.profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", entry.context)])


def _experiment(client: MlflowClient, config: RunConfig, uri: str) -> str:
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is not None:
        return experiment.experiment_id
    # A sqlite store would put artifacts under the current folder, wherever that is.
    local = uri.startswith("sqlite") and "://" not in config.run_folder
    location = (Path(config.run_folder).resolve() / "artifacts").as_uri() if local else None
    return client.create_experiment(config.tracking.experiment, artifact_location=location)


def _adopt_journals(run: TrackedRun, newest: int) -> None:
    """Move what processes under leases up to `newest` could not send into the driver's journal, but for the status."""
    driver = Journal(run.journal("driver"))
    for path in sorted(Path(run.spool).glob("*.jsonl")):
        match = _RUN_JOURNAL.fullmatch(path.name)
        if path == driver.path or match is None or int(match[1] or 0) > newest:
            continue
        left = Journal(path)
        while entries := left.read(ENTRIES_PER_READ):
            for entry, _ in entries:
                if "status" not in entry:
                    driver.append(entry)
            left.commit(entries[-1][1])
        left.remove()


def _note_resume(run: TrackedRun, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    journal = Journal(run.journal("driver"))
    journal.append({"status": "RUNNING"})
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            journal.append({"tag": f"resumed.{_key(key)}"[:250], "value": _shortened(now.get(key, "not set"))})


def connect(uri: str) -> MlflowClient:
    """A client of a tracking store that is quiet and gives up soon."""
    # By default MLflow retries a request for minutes; our journal waits better than a blocked thread does.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _spool_folder(config: RunConfig) -> str:
    """`tracking/` in the run folder; for one in a bucket, a folder on this machine that a restart finds again."""
    if "://" not in config.run_folder:
        return str(Path(config.run_folder).resolve() / "tracking")
    name = sha256(config.run_folder.encode()).hexdigest()[:16]
    return str(Path.home() / ".cache" / "m2f" / "tracking" / name)


def _is_refusal(error: MlflowException, uri: str) -> bool:
    """Whether the store itself says no for good; the 404 page of a proxy whose server restarts does not count."""
    return error.error_code in _REFUSALS and (isinstance(error, RestException) or not uri.startswith("http"))


def _shortened(value: str) -> str:
    """MLflow keeps 6000 characters of a parameter; the whole text is in the recipe artifact."""
    return value if len(value) <= MAX_PARAM_CHARS else value[: MAX_PARAM_CHARS - 3] + "..."


def _key(name: str) -> str:
    return _NOT_ALLOWED.sub("_", name)


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
