"""Write to MLflow. Once a run has started, its training neither waits for MLflow nor fails because of it.

Every entry goes to a journal file first, and a thread sends it from there. The journal grows while the server does not
answer; its entries are sent when the server answers again or when the run is continued. Steps that the server already
has are not sent again, so the curves of a resumed run have one point per step. Only MlflowClient is used, because the
fluent API marks a run FINISHED when any of its processes exits.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.exceptions import MlflowException

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import dump_recipe, flatten
from m2f.cluster.tracking.database import make_database
from m2f.cluster.tracking.journal import Entry, Journal
from m2f.cluster.tracking.local_store import (
    FOLDER_TAG,
    StoredRun,
    artifact_root,
    current_uri,
    find_stored,
    is_copy,
    is_shared,
    local_database,
    prepare,
    sqlite_uri,
)
from m2f.cluster.tracking.logged_models import (
    EvaluatedCheckpoint,
    KeptCheckpoints,
    SetMetrics,
    dataset_input,
    evaluation_entry,
)
from m2f.cluster.tracking.presentation import EXPERIMENT_KIND, MODEL_TRAINING, PARENT_TAG, parent_run, ui_tags
from m2f.cluster.tracking.provenance import DataInput, code_facts, data_facts, data_inputs
from m2f.cluster.tracking.record import RunRecord, read_record, record_url, write_record
from m2f.cluster.tracking.retrier import StoreRetrier
from m2f.cluster.tracking.sender import ENTRIES_PER_READ, Sender
from m2f.cluster.tracking.store import (
    MAX_PARAM_CHARS,
    TrackingError,
    canonical_uri,
    checked_uri,
    connect,
    shortened,
    store_errors,
    store_key,
    text_condition,
)
from m2f.cluster.tracking.tracked_run import RunLease, TrackedRun
from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.storage.storage import Storage

LOGGER = logging.getLogger(__name__)
RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

PARAMS_PER_CALL = 100
"""Largest number of parameters that MLflow accepts in one call."""
MAX_SEND_PAUSE_S = 60.0
"""Longest pause in seconds between two attempts to send to a store that does not answer. The journal keeps all."""
_RUN_JOURNAL = re.compile(r"(?:driver|rank0|evaluation)(?:-(\d+))?\.jsonl")


def create_run(config: RunConfig, lease: int = 0) -> TrackedRun:
    """Create the MLflow run of this run folder, or continue the run in `tracking.json`. Only the driver calls this.

    The inputs of the run are the data sets with their fingerprints, and its tags name the commit of the code.
    Continuing a run contacts no server, unless `tracking.json` is damaged or names another URI. Settings, code and data
    that have changed are logged as tags `resumed.<setting>`. With a `lease`, pending entries of earlier lease holders
    are taken over.

    Raises:
        TrackingError: the store cannot be prepared or reached, or refuses the run; or the journals cannot be written.
        TrackingOutageError: a server that had answered before did not answer for `storage.patience_s`.
    """
    uri, spool, parameters = tracking_uri(config), _spool_folder(config), flatten(config)
    _prepare(config, uri)
    storage = Storage(config.storage)
    inputs = data_inputs(config, storage)
    facts = code_facts() | data_facts(inputs)
    record = _known_run(config, storage, uri)
    run_lease = RunLease(config.run_folder, lease, config.storage) if lease else None
    stored = None if record is None else _find_continued_run(config, record, uri)
    if record is not None and stored is not None:
        recreated = record.lacks_evaluations
        run = TrackedRun(uri=uri, run_id=record.run_id, spool=spool, lease=run_lease, recreated=recreated)
        _continue_journals(run, (record.parameters or parameters) | (record.facts or facts), parameters | facts)
        if stored.folder != config.run_folder:  # a moved folder; the tag restores a damaged `tracking.json`
            Journal(run.journal("driver")).append({"tag": FOLDER_TAG, "value": config.run_folder})
    else:
        run_id = _start_run(config, uri, parameters, facts, inputs)
        run = TrackedRun(uri=uri, run_id=run_id, spool=spool, lease=run_lease, recreated=record is not None)
        if record is not None:
            LOGGER.warning(
                f"tracking: found no MLflow run {record.run_id} of this run folder (recorded in {record.uri}); "
                f"creating it again in {uri} from the metrics and evaluations in the run folder"
            )
    if record is None or record.uri != uri or record.run_id != run.run_id or record.parameters is None:
        write_record(storage, config.run_folder, RunRecord(uri, run.run_id, parameters, facts, run.recreated))
    return run


def find_run(config: RunConfig) -> TrackedRun | None:
    """Return the MLflow run of this run folder, to add results to it; None if there is none.

    Its store is that of the settings if that contains the run, otherwise the one in `tracking.json`.
    """
    uri = tracking_uri(config)
    record = _known_run(config, Storage(config.storage), uri)
    if record is None:
        return None
    if record.uri == uri or not _contains_run(config, record, uri):
        uri = current_uri(config.run_folder, record.uri, record.run_id)
    _prepare(config, uri)
    return TrackedRun(uri=uri, run_id=record.run_id, spool=_spool_folder(config))


def tracking_uri(config: RunConfig) -> str:
    """Return the recipe's tracking.uri, else MLFLOW_TRACKING_URI, else the URI of a sqlite file (see `local_store`).

    See `canonical_uri` for its form. Raises TrackingError if the URI may contain a secret, or if `output` is in a
    bucket and no URI is set.
    """
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and "://" in config.run_folder:
        raise TrackingError(
            f"output is {config.output}, which cannot hold a sqlite file: set tracking.uri or MLFLOW_TRACKING_URI"
        )
    return canonical_uri(checked_uri(uri)) if uri else sqlite_uri(local_database(config.run_folder))


class Tracking:
    """Writes one process's metrics to an MLflow run. Logging neither raises nor waits for the server.

    Only `close`, `finish` and `abandon` block. `writer` names the journal, such as "driver" or "evaluation".
    Only one running process may use a name.
    """

    def __init__(self, run: TrackedRun, writer: str, interval_s: float = 2.0) -> None:
        self._run = run
        self._journal = Journal(run.journal(writer))
        self._sender = Sender(run, self._journal)
        self._interval_s = interval_s
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._disk_refused = False
        self._thread = threading.Thread(target=self._send_all, name=f"tracking-{writer}", daemon=True)
        self._thread.start()

    def log_metrics(self, step: int, values: Mapping[str, float], replaces: bool = False) -> bool:
        """Log values at an optimizer step; return False if the disk refuses them.

        Values that the store already has at this step stay, unless `replaces` is set. MLflow then shows the new ones,
        because their time is later.
        """
        points = {store_key(name): float(value) for name, value in values.items()}
        entry: Entry = {"step": step, "time_ms": time.time_ns() // 1_000_000, "metrics": points}
        return self._append(entry | {"replaces": True} if replaces else entry)

    def log_evaluation(
        self, checkpoint: EvaluatedCheckpoint, sets: Sequence[SetMetrics], replaces: bool = False
    ) -> None:
        """Log an evaluation: metrics at the checkpoint's step, its logged model, and tables of classes."""
        named = [
            replace(set_metrics, metrics={store_key(name): float(value) for name, value in set_metrics.metrics.items()})
            for set_metrics in sets
        ]
        self._append(evaluation_entry(checkpoint, named, time.time_ns() // 1_000_000, replaces))

    def log_kept(self, kept: KeptCheckpoints) -> None:
        """Log which checkpoints exist; the logged models of other checkpoints are tagged as deleted."""
        self._append({"kept": sorted(kept.names), "newest": kept.newest})

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Log a local file or folder under `folder` of the run's artifacts. It is read when it is sent.

        A folder below the spool folder is deleted afterwards.
        """
        self._append({"artifact": str(Path(path).resolve()), "folder": folder})

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag of the run; the last value wins."""
        self._append({"tag": store_key(name), "value": value[:MAX_PARAM_CHARS]})

    def finish(self, status: RunStatus, timeout_s: float = 60.0, kept: KeptCheckpoints | None = None) -> bool:
        """Set the final status, send all pending entries, including those in journals of other processes, and close.

        Waits at most `timeout_s` seconds for each journal. Returns whether everything was sent.
        """
        adopted = self._adopt_journals_of_lease()
        if kept is not None:
            self.log_kept(kept)
        self._append({"status": status})
        sent = self.close(timeout_s)
        for path in sorted(Path(self._run.spool).glob("*.jsonl")) if sent else ():
            leftover = Tracking(replace(self._run, lease=None), path.stem, self._interval_s)
            sent = leftover.close(timeout_s) and sent
        return sent and adopted

    def _adopt_journals_of_lease(self) -> bool:
        """Take over the journals of the processes of this lease. Returns whether the disk had room for that."""
        try:
            if self._run.lease is not None:
                _adopt_journals(self._run, self._run.lease.number)
        except OSError as error:
            LOGGER.warning(
                f"tracking: {self._run.spool}: metrics of other processes of this run were not sent ({error}); free "
                "some space, and start the run again to send them"
            )
            return False
        return True

    def abandon(self) -> None:
        """Stop sending, because another process has taken over the run; that process sends the journal."""
        self._sender.stop()
        self._deadline = 0.0  # ends the thread even if the store does not answer
        self._closing.set()
        self._thread.join()

    def close(self, timeout_s: float = 30.0) -> bool:
        """Send pending entries for at most `timeout_s` seconds; return whether all were sent.

        Entries that could not be sent stay in the journal.
        """
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s + 1.0)
        if self._thread.is_alive() or self._journal.read(1):
            LOGGER.warning(
                f"tracking: {self._run.uri} did not accept the last metrics of run {self._run.run_id} "
                f"({self._sender.last_error or 'it is slow'}); they are kept in {self._journal.path} "
                "and sent when the run is continued"
            )
            return False
        self._journal.remove()
        return True

    def _append(self, entry: Entry) -> bool:
        try:
            self._journal.append(entry)
        except OSError as error:
            if not self._disk_refused:
                LOGGER.warning(
                    f"tracking: cannot write {self._journal.path} ({error}); free some space. Step metrics are sent "
                    "when the run ends or is continued"
                )
            self._disk_refused = True
            return False
        self._disk_refused = False
        return True

    def _send_all(self) -> None:
        pause_s = self._interval_s
        while True:
            is_closing = self._closing.is_set()  # read before sending, so entries appended before `close` are sent
            more = self._sender.send_pending()
            if self._sender.last_error:
                pause_s = min(MAX_SEND_PAUSE_S, pause_s * 2)
            elif more:
                continue
            else:
                pause_s = self._interval_s
            if is_closing:
                if not self._sender.last_error or time.monotonic() > self._deadline:
                    return
                time.sleep(min(pause_s, 1.0))
            else:
                self._closing.wait(pause_s)


def _database_for_uri(config: RunConfig, uri: str) -> Path | None:
    """Return the local sqlite file of the run if `uri` is its URI; otherwise None."""
    if "://" in config.run_folder:
        return None
    database = local_database(config.run_folder)
    return database if uri == sqlite_uri(database) else None


def _prepare(config: RunConfig, uri: str) -> None:
    """Prepare the local store if `uri` is its URI. Call this before any other access to it.

    Raises TrackingError if the store cannot be created or upgraded.
    """
    database = _database_for_uri(config, uri)
    if database is not None:
        with store_errors(uri):
            prepare(database, is_shared(config.run_folder, database), connect, config.storage.patience_s)


def _find_continued_run(config: RunConfig, known: RunRecord, uri: str) -> StoredRun | None:
    """Return the recorded run; None if the store `uri` lacks it, or it was deleted or belongs to another run folder.

    A server is contacted only if the record names another URI, because it may have a new address; otherwise it counts
    as containing the run. Raises TrackingError if the sqlite file cannot be read or the server does not answer.
    """
    path = uri.removeprefix("sqlite:///")
    if path == uri and known.uri == uri:
        return StoredRun(config.run_folder)
    with store_errors(uri):
        if path != uri:
            stored = find_stored(Path(path.partition("?")[0]), known.run_id)
        else:
            stored = _find_on_server(config, known.run_id, uri)
    return None if stored is None or stored.is_deleted or is_copy(stored, config.run_folder) else stored


def _find_on_server(config: RunConfig, run_id: str, uri: str) -> StoredRun | None:
    client = connect(uri)
    try:
        run = StoreRetrier(uri, config.storage.patience_s).ask(lambda: client.get_run(run_id))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return StoredRun(run.data.tags.get(FOLDER_TAG, ""), run.info.lifecycle_stage == "deleted")


def _contains_run(config: RunConfig, known: RunRecord, uri: str) -> bool:
    """Return whether the store of the settings contains the recorded run. If the settings name it, log if it does not.

    The record names another store, which may have moved to `uri`.
    """
    try:
        if _find_continued_run(config, known, uri) is not None:
            return True
        problem = f"{uri} does not contain MLflow run {known.run_id} of this run folder"
    except TrackingError as error:
        problem = str(error)
    if config.tracking.uri:
        LOGGER.warning(f"tracking: {problem}. Using {known.uri}, which {record_url(config.run_folder)} names")
    return False


def _known_run(config: RunConfig, storage: Storage, uri: str) -> RunRecord | None:
    """Return the run in `tracking.json`; if that file is damaged, the newest run of this run folder in the store."""
    try:
        return read_record(storage, config.run_folder)
    except StorageError:
        raise
    except ValueError as error:
        found = _find_tagged_run(config, uri)
        outcome = "found no run of this folder; training creates one" if found is None else f"found run {found} there"
        LOGGER.warning(f"{record_url(config.run_folder)} cannot be read ({error}): searched {uri} and {outcome}")
    return None if found is None else RunRecord(uri, found, None, None)


def _find_tagged_run(config: RunConfig, uri: str) -> str | None:
    """Return the id of the newest run with the tag of this run folder; None if there is none."""
    database = _database_for_uri(config, uri)
    if database is not None and not database.exists():
        return None
    with store_errors(uri):
        client = connect(uri)
        retrier = StoreRetrier(uri, config.storage.patience_s)
        experiment = retrier.ask(lambda: client.get_experiment_by_name(config.tracking.experiment))
        if experiment is None:
            return None
        # A run folder's own database holds only runs of the folder. Its tag is ignored, as it is outdated after a move.
        is_own = database is not None and not is_shared(config.run_folder, database)
        query = "" if is_own else text_condition(f"tags.`{FOLDER_TAG}`", config.run_folder)
        found = retrier.ask(lambda: client.search_runs([experiment.experiment_id], query))  # newest first
        matching = (run for run in found if is_own or run.data.tags.get(FOLDER_TAG) == config.run_folder)
        return next((run.info.run_id for run in matching), None)


def _start_run(
    config: RunConfig, uri: str, parameters: Mapping[str, str], facts: Mapping[str, str], inputs: Sequence[DataInput]
) -> str:
    """Create the run with its parameters, tags, inputs and recipe; return its id."""
    with store_errors(uri):
        if uri.startswith("sqlite:///"):
            make_database(Path(uri.removeprefix("sqlite:///")), connect)
        client, retrier = connect(uri), StoreRetrier(uri, config.storage.patience_s)
        experiment = retrier.ask(lambda: _ensure_experiment(client, config, uri))
        parent = retrier.ask(lambda: parent_run(client, experiment, config.tracking.parent, uri))
        tags = {**facts, **ui_tags(config, facts, inputs), **({PARENT_TAG: parent} if parent else {})}
        run_id = retrier.ask(_RunCreator(client, config, experiment, tags))
        params = [Param(store_key(key)[:250], shortened(value)) for key, value in parameters.items()]
        for start in range(0, len(params), PARAMS_PER_CALL):
            group = params[start : start + PARAMS_PER_CALL]
            retrier.ask(lambda group=group: client.log_batch(run_id, params=group))
        retrier.ask(lambda: client.log_inputs(run_id, [dataset_input(entry) for entry in inputs]))
        retrier.ask(lambda: client.log_text(run_id, dump_recipe(config), "recipe.yaml"))
    return run_id


class _RunCreator:
    """Creates a run once. If the answer to a call is lost, the next call finds the run by its start time and folder."""

    def __init__(self, client: MlflowClient, config: RunConfig, experiment: str, tags: Mapping[str, str]) -> None:
        self._client, self._config, self._experiment = client, config, experiment
        self._tags = {FOLDER_TAG: config.run_folder, "m2f.version": version("m2f"), **tags}
        self._start_ms = time.time_ns() // 1_000_000
        self._called = False

    def __call__(self) -> str:
        called, self._called = self._called, True
        if called:
            query = f"attributes.start_time = {self._start_ms}"
            for run in self._client.search_runs([self._experiment], query):
                if run.data.tags.get(FOLDER_TAG) == self._config.run_folder:
                    return run.info.run_id
        created = self._client.create_run(self._experiment, self._start_ms, self._tags, self._config.name)
        return created.info.run_id


def _ensure_experiment(client: MlflowClient, config: RunConfig, uri: str) -> str:
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is not None:
        if EXPERIMENT_KIND not in experiment.tags:
            client.set_experiment_tag(experiment.experiment_id, EXPERIMENT_KIND, MODEL_TRAINING)
        return experiment.experiment_id
    # By default, a sqlite store puts artifacts into the current folder.
    location, database = None, _database_for_uri(config, uri)
    if database is not None:
        location = artifact_root(database, is_shared(config.run_folder, database))
    elif uri.startswith("sqlite") and "://" not in config.run_folder:
        location = (Path(config.run_folder).resolve() / "artifacts").as_uri()
    try:
        kind = {EXPERIMENT_KIND: MODEL_TRAINING}
        return client.create_experiment(config.tracking.experiment, location, kind)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        created = client.get_experiment_by_name(config.tracking.experiment)  # another driver created it first
        assert created is not None, "MLflow says that it exists"
        return created.experiment_id


def _adopt_journals(run: TrackedRun, newest: int) -> None:
    """Move unsent entries, except statuses, of processes with leases up to `newest` to the driver's journal.

    At the start of a run, entries of earlier evaluations go to the evaluation journal of this lease instead, so that a
    single process creates models and tables.
    """
    assert run.lease is not None
    is_run_end = newest == run.lease.number
    driver = Journal(run.journal("driver"))
    evaluation = driver if is_run_end else Journal(run.journal("evaluation"))
    for path in sorted(Path(run.spool).glob("*.jsonl")):
        match = _RUN_JOURNAL.fullmatch(path.name)
        if path in (driver.path, evaluation.path) or match is None or int(match[1] or 0) > newest:
            continue
        source_journal, destination = Journal(path), evaluation if path.name.startswith("evaluation") else driver
        while entries := source_journal.read(ENTRIES_PER_READ):
            for entry, _ in entries:
                if "status" not in entry:
                    destination.append(entry)
            source_journal.commit(entries[-1][1])
        source_journal.remove()


def _continue_journals(run: TrackedRun, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Take over unsent entries of earlier processes, and log what has changed.

    Raises TrackingError if the journals cannot be written.
    """
    try:
        if run.lease is not None:
            _adopt_journals(run, run.lease.number - 1)
        _log_resume(run, before, now)
    except OSError as error:
        raise TrackingError(
            f"cannot write metrics for MLflow to {run.spool} ({error}); free some space, or check its owner and mode"
        ) from error


def _log_resume(run: TrackedRun, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    journal = Journal(run.journal("driver"))
    journal.append({"status": "RUNNING"})
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            journal.append({"tag": f"resumed.{store_key(key)}"[:250], "value": shortened(now.get(key, "not set"))})


def _spool_folder(config: RunConfig) -> str:
    """Return `tracking/` in the run folder; for a run folder in a bucket, a local folder derived from its URL."""
    if "://" not in config.run_folder:
        return str(Path(config.run_folder).resolve() / "tracking")
    name = sha256(config.run_folder.encode()).hexdigest()[:16]
    return str(Path.home() / ".cache" / "m2f" / "tracking" / name)
