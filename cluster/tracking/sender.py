"""Send the entries of a journal to a tracking store."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import assert_never

from mlflow import MlflowClient
from mlflow.entities import Metric

from m2f.cluster.tracking.journal import Entry, Journal, Kind, kind_of
from m2f.cluster.tracking.logged_models import (
    KeptCheckpoints,
    LoggedModels,
    linked_metric,
    parse_evaluation,
    write_table,
)
from m2f.cluster.tracking.store import METRICS_PER_CALL, brief, connect, is_refusal
from m2f.cluster.tracking.tracked_run import TrackedRun
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.lease_record import check_lease
from m2f.trainer.errors import LeaseLostError

LOGGER = logging.getLogger(__name__)
ENTRIES_PER_READ = 200
"""Largest number of journal entries that are sent before they are committed. After a failure, all are sent again."""


class Sender:
    """Sends journal entries to the store, in order, each point once."""

    def __init__(self, run: TrackedRun, journal: Journal) -> None:
        self._run, self._journal = run, journal
        self._client: MlflowClient | None = None
        self._models: LoggedModels | None = None
        self._latest: dict[str, int] | None = None
        """Last stored step by metric; None at the start and after every failure, when the store must be queried."""
        self._steps: dict[str, set[int]] = {}
        """All stored steps of a metric, for metrics that were sent at or before their last stored step."""
        self.last_error = ""
        """Why the last attempt failed; "" if it succeeded."""
        self._storage = Storage(run.lease.storage) if run.lease is not None else None
        self._stopped = False

    def stop(self) -> None:
        """Stop sending after the current batch."""
        self._stopped = True

    def send_pending(self) -> bool:
        """Send a batch of pending entries and commit them.

        Returns True if a batch was sent; False if no entry is pending, the store does not answer, or this process may
        no longer send.
        """
        try:
            if not self._may_send():
                return False
            entries = self._journal.read(ENTRIES_PER_READ)
            while entries:
                entries = self._send_group(entries)
                self._log_recovery()
                if not entries:
                    return True
        except Exception as error:  # a store, driver or proxy can raise anything, and training must continue
            self._latest = None
            if not self.last_error:
                LOGGER.warning(f"tracking: {self._run.uri} does not respond ({brief(error)}); metrics are kept on disk")
            self.last_error = brief(error)
        return False

    def _may_send(self) -> bool:
        """Return whether this process may still write to the run: it has not lost the lease and was not stopped."""
        lease = self._run.lease
        if lease is not None and self._storage is not None and not self._stopped:
            try:
                check_lease(self._storage, lease.run_folder, lease.number)
            except LeaseLostError:
                self._stopped = True
        return not self._stopped

    def _send_group(self, entries: list[tuple[Entry, int]]) -> list[tuple[Entry, int]]:
        """Send the first entry, or all metrics up to the next entry of another kind; return the rest."""
        kinds = [kind_of(entry) for entry, _ in entries]
        count = 1
        if kinds[0] == "metrics":
            count = next((i for i, kind in enumerate(kinds) if kind != "metrics"), len(entries))
        group, rest = entries[:count], entries[count:]
        sent = [entry for entry, _ in group]
        try:
            self._send(kinds[0], sent)
        except Exception as error:
            if not is_refusal(error, self._run.uri):
                raise
            self._latest = None
            self._set_aside(sent, f"{self._run.uri} rejected {len(group)} entries ({brief(error)}); they are kept")
        self._journal.commit(group[-1][1])
        if kinds[0] == "artifact":
            self._delete_copy(sent[0]["artifact"])
        return rest

    def _delete_copy(self, artifact: str) -> None:
        """Delete a folder below the spool folder. It is the copy of a folder in a bucket, made only to be sent."""
        if Path(artifact).is_relative_to(Path(self._run.spool).resolve()):
            shutil.rmtree(artifact, ignore_errors=True)

    def _set_aside(self, group: list[Entry], reason: str) -> None:
        """Set aside entries that can never be sent, and log the reason."""
        self._journal.set_aside(group)
        LOGGER.warning(f"tracking: {reason} in {self._journal.refused}")

    def _send(self, kind: Kind | None, group: list[Entry]) -> None:
        client, run_id, first = self._connect(), self._run.run_id, group[0]
        match kind:
            case "metrics":
                points = self._new_points(client, group)
                for start in range(0, len(points), METRICS_PER_CALL):
                    client.log_batch(run_id, points[start : start + METRICS_PER_CALL])
                self._record_sent(points)
            case "evaluation":
                self._send_evaluation(client, first)
            case "kept":
                self._logged_models(client).update_states(
                    KeptCheckpoints(names=frozenset(first["kept"]), newest=first["newest"])
                )
            case "artifact":
                _send_artifact(client, run_id, first["artifact"], first["folder"] or None)
            case "tag":
                client.set_tag(run_id, first["tag"], first["value"])
            case "status" if first["status"] == "RUNNING":
                client.update_run(run_id, status="RUNNING")
            case "status":
                client.set_terminated(run_id, first["status"])
            case None:
                self._set_aside(group, f"an entry is damaged or was written by another version of m2f; {first} is kept")
            case _:
                assert_never(kind)

    def _send_evaluation(self, client: MlflowClient, entry: Entry) -> None:
        """Send the metrics of an evaluation for the run and its logged model, and the tables of classes."""
        try:
            checkpoint, sets = parse_evaluation(entry)
        except (TypeError, LookupError):
            self._set_aside([entry], "an evaluation was written by another version of m2f; it is kept")
            return
        models = self._logged_models(client)
        models.link_data(sets)
        model = models.ensure(checkpoint)
        self._load_latest_steps(client)
        points = [
            set_metrics.point(key, value, entry["time_ms"], checkpoint.step, None if model is None else model.model_id)
            for set_metrics in sets
            for key, value in set_metrics.metrics.items()
        ]
        points = [point if entry["replaces"] else self._as_stored(client, point) for point in points]
        models.add_metrics(model, points)
        self._record_sent(points)
        if model is not None:  # reading a table with MLflow's client requires logged models
            for set_metrics in sets:
                write_table(client, self._run.run_id, checkpoint.step, set_metrics)

    def _as_stored(self, client: MlflowClient, metric: Metric) -> Metric:
        """Return the metric with the stored value and time if the run has it at this step, to avoid a duplicate."""
        if not self._is_stored(client, metric.key, metric.step):
            return metric
        history = client.get_metric_history(self._run.run_id, metric.key)
        stored = max((point for point in history if point.step == metric.step), key=lambda point: point.timestamp)
        return linked_metric(stored, metric.model_id, metric)

    def _logged_models(self, client: MlflowClient) -> LoggedModels:
        if self._models is None:
            self._models = LoggedModels(client, self._run.run_id)
        return self._models

    def _load_latest_steps(self, client: MlflowClient) -> None:
        """Query the last stored step of each metric, unless it is already known."""
        if self._latest is None:
            self._steps.clear()
            metrics = client.get_run(self._run.run_id).data.to_proto().metrics
            self._latest = {metric.key: metric.step for metric in metrics}

    def _new_points(self, client: MlflowClient, group: list[Entry]) -> list[Metric]:
        """Return the metrics of the entries, each once. Metrics that the store already has at their step are omitted.

        Entries that replace stored values are always included.
        """
        self._load_latest_steps(client)
        points: dict[tuple[str, int], Metric] = {}
        for entry in group:
            step = entry["step"]
            for key, value in entry["metrics"].items():
                metric = Metric(key, value, entry["time_ms"], step)
                if entry.get("replaces"):
                    points[key, step] = metric
                elif not self._is_stored(client, key, step):
                    points.setdefault((key, step), metric)
        return list(points.values())

    def _is_stored(self, client: MlflowClient, key: str, step: int) -> bool:
        assert self._latest is not None
        if step > self._latest.get(key, -1):
            return False
        if key not in self._steps:
            self._steps[key] = {metric.step for metric in client.get_metric_history(self._run.run_id, key)}
        return step in self._steps[key]

    def _record_sent(self, points: list[Metric]) -> None:
        assert self._latest is not None
        for point in points:
            self._latest[point.key] = max(point.step, self._latest.get(point.key, -1))
            if point.key in self._steps:
                self._steps[point.key].add(point.step)

    def _connect(self) -> MlflowClient:
        if self._client is None:
            self._client = connect(self._run.uri)
        return self._client

    def _log_recovery(self) -> None:
        if self.last_error:
            LOGGER.warning(f"tracking: {self._run.uri} responds again; sending the pending metrics")
        self.last_error = ""


def _send_artifact(client: MlflowClient, run_id: str, path: str, folder: str | None) -> None:
    if os.path.isdir(path):
        client.log_artifacts(run_id, path, folder)
    elif os.path.exists(path):
        client.log_artifact(run_id, path, folder)
    else:
        LOGGER.warning(f"tracking: {path} no longer exists, so it was not logged")
