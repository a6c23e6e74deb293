from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from m2f.cluster.recipe.load import parse_recipe
from m2f.cluster.tracking.journal import Journal
from m2f.cluster.tracking.sender import Sender
from m2f.cluster.tracking.tracking import TrackedRun, Tracking, TrackingError, create_run, find_run, tracking_uri
from tests.mlflow_server import free_port, start_server
from tests.waiting import PATIENCE_S, wait_until

RECIPE = """
name: tracked
datasets: {train: {shards: shards/train}}
data: {train: [{dataset: train}]}
training: {max_steps: 10}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return dataclasses.replace(parse_recipe(RECIPE), output=str(tmp_path / "runs"))


@pytest.fixture
def run(config, migrated_database, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").write_bytes(migrated_database)
    return create_run(config)


def history(run, key, uri=None):
    client = MlflowClient(tracking_uri=uri or run.uri)
    return sorted((m.step, m.value) for m in client.get_metric_history(run.run_id, key))


def test_journal_rereads_uncommitted_entries_and_skips_a_partial_line(tmp_path):
    journal = Journal(tmp_path / "a.jsonl")
    for n in range(3):
        journal.append({"n": n})
    first, rest = journal.read(1), journal.read(10)
    assert [entry["n"] for entry, _ in rest] == [0, 1, 2]
    journal.commit(first[0][1])
    with journal.path.open("ab") as file:
        file.write(b'{"n": 3')  # as if killed while writing
    again = Journal(tmp_path / "a.jsonl")
    again.append({"n": 4})
    assert [entry["n"] for entry, _ in again.read(10)] == [1, 2, 4]
    again.remove()
    assert not list(tmp_path.iterdir())


def test_entries_appended_after_another_process_removed_the_journal_are_read(tmp_path):
    first, second = Journal(tmp_path / "a.jsonl"), Journal(tmp_path / "a.jsonl")
    first.append({"tag": "a", "value": "1"})
    for journal in (first, second):
        for _, position in journal.read(10):
            journal.commit(position)
    first.remove()
    added = {"tag": "b", "value": "a longer text, so the file has more bytes than before"}
    second.append(added)
    assert [entry for entry, _ in second.read(10)] == [added]


def test_run_has_parameters_recipe_tags_metrics_and_artifacts(config, run, tmp_path):
    (tmp_path / "table.txt").write_text("pq 50")
    tracking = Tracking(run, "driver", interval_s=0.05)
    tracking.log_metrics(1, {"loss": 2.0, "pq/traffic light, red": 0.5})
    tracking.log_metrics(2, {"loss": float("nan")})
    tracking.log_artifact(tmp_path / "table.txt", "evaluation")
    tracking.set_tag("note", "x")
    assert tracking.finish("FINISHED", PATIENCE_S)
    client = MlflowClient(tracking_uri=run.uri)
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "tracked"
    assert stored.data.params["training.max_steps"] == "10"
    assert stored.data.tags["note"] == "x"
    assert history(run, "pq/traffic light_ red") == [(1, 0.5)]
    assert [s for s, _ in history(run, "loss")] == [1, 2]
    assert math.isnan(history(run, "loss")[1][1])
    names = {a.path for a in client.list_artifacts(run.run_id)}
    assert names == {"recipe.yaml", "evaluation"}
    assert not os.listdir(run.spool)


def test_folder_in_the_spool_folder_is_deleted_once_it_is_sent(run, tmp_path):
    folders = [tmp_path / "results", Path(run.spool) / "evaluation-1"]
    tracking = Tracking(run, "evaluation", interval_s=0.05)
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "results.json").write_text("{}")
        tracking.log_artifact(folder, folder.name)
    assert tracking.close(PATIENCE_S)
    client = MlflowClient(tracking_uri=run.uri)
    assert all(client.list_artifacts(run.run_id, folder.name) for folder in folders)
    assert [folder.exists() for folder in folders] == [True, False]


def test_resumed_run_continues_the_same_mlflow_run_without_repeated_steps(config, run):
    first = Tracking(run, "rank0", interval_s=0.05)
    for step in (1, 2, 3):
        first.log_metrics(step, {"loss": float(step)})
    assert first.close(PATIENCE_S)
    changed = dataclasses.replace(config, seed=7)
    again = create_run(changed)
    assert again == run
    second = Tracking(again, "rank0", interval_s=0.05)
    for step in (2, 3, 4, 5):  # resumed from the checkpoint of step 1
        second.log_metrics(step, {"loss": float(step), "new": 0.0})
    assert second.close(PATIENCE_S)
    assert Tracking(again, "driver", interval_s=0.05).finish("FINISHED", PATIENCE_S)
    assert history(run, "loss") == [(n, float(n)) for n in (1, 2, 3, 4, 5)]
    assert len(history(run, "new")) == 4
    assert MlflowClient(tracking_uri=run.uri).get_run(run.run_id).data.tags["resumed.seed"] == "7"


def test_late_steps_missing_in_the_store_are_sent(run):
    first = Tracking(run, "evaluation", interval_s=0.05)
    first.log_metrics(20, {"pq": 0.2})
    assert first.close(PATIENCE_S)
    second = Tracking(run, "evaluation", interval_s=0.05)
    second.log_metrics(10, {"pq": 0.1})
    second.log_metrics(20, {"pq": 0.2})
    assert second.close(PATIENCE_S)
    assert history(run, "pq") == [(10, 0.1), (20, 0.2)]


def test_entries_appended_while_closing_are_sent(run):
    tracking, late = Tracking(run, "driver", interval_s=0.02), []
    send = tracking._sender.send_pending

    def send_and_write():
        more = send()
        if not late:
            late.append(1)
            tracking.log_metrics(1, {"loss": 1.0})
            tracking._closing.set()
        return more

    tracking._sender.send_pending = send_and_write
    wait_until(lambda: late)
    assert tracking.close(PATIENCE_S)
    assert history(run, "loss") == [(1, 1.0)]


def test_repeated_steps_are_sent_once(run):
    tracking = Tracking(run, "driver", interval_s=0.02)
    for step in (1, 2, 1, 2):  # sent in one or two batches
        tracking.log_metrics(step, {"loss": float(step)})
    wait_until(lambda: len(history(run, "loss")) == 2)
    for step in (2, 3, 4, 3, 2, 7, 6):  # 5 is missing, 6 comes late
        tracking.log_metrics(step, {"loss": float(step)})
    tracking.close(PATIENCE_S)
    again = Tracking(run, "driver", interval_s=0.02)
    for step in (7, 5, 6, 7, 5, 8, 1):
        again.log_metrics(step, {"loss": float(step)})
        if step == 6:
            again.set_tag("event.resumed", "points before and after it are sent apart")
    again.close(PATIENCE_S)
    assert history(run, "loss") == [(step, float(step)) for step in range(1, 9)]


def test_replacing_results_become_the_current_metric_of_the_run(run):
    tracking = Tracking(run, "evaluation", interval_s=0.05)
    tracking.log_metrics(10, {"val/PQ": 40.0})
    tracking.log_metrics(10, {"val/PQ": 41.0})
    wait_until(lambda: history(run, "val/PQ") == [(10, 40.0)])
    tracking.log_metrics(10, {"val/PQ": 30.0}, replaces=True)
    assert tracking.close(PATIENCE_S)
    assert sorted(history(run, "val/PQ")) == [(10, 30.0), (10, 40.0)]
    assert MlflowClient(tracking_uri=run.uri).get_run(run.run_id).data.metrics["val/PQ"] == 30.0


def test_metrics_of_a_killed_process_are_sent_exactly_once(run):
    command = [sys.executable, Path(__file__).with_name("killed_writer.py"), run.uri, run.run_id, run.spool, "50"]
    killed = subprocess.run(command, capture_output=True, timeout=PATIENCE_S)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert Tracking(run, "driver", interval_s=0.05).finish("FAILED", PATIENCE_S)  # sends rank 0's journal too
    assert history(run, "loss") == [(n, float(n)) for n in range(50)]


def test_rejected_entry_does_not_block_the_following_ones(run, caplog):
    tracking = Tracking(run, "rank0", interval_s=0.05)
    tracking.log_metrics(1, {"x" * 300: 1.0})  # MLflow accepts keys of up to 250 characters
    tracking.set_tag("note", "x")
    tracking.log_metrics(2, {"loss": 1.0})
    assert tracking.close(PATIENCE_S)
    assert history(run, "loss") == [(2, 1.0)]
    assert "rejected 1 entries" in caplog.text
    assert "x" * 300 in run.journal("rank0").with_suffix(".jsonl.refused").read_text()


def at(config, uri):
    return dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, uri=uri))


def test_run_at_a_relative_uri_is_continued_from_another_folder(config, migrated_database, tmp_path, monkeypatch):
    (tmp_path / "shared.db").write_bytes(migrated_database)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///shared.db")
    run = create_run(config)
    assert run.uri == f"sqlite:///{tmp_path}/shared.db"
    record = Path(config.run_folder, "tracking.json")
    record.write_text(record.read_text().replace(run.uri, "sqlite:///shared.db"))  # as earlier versions wrote it
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///../shared.db")
    assert find_run(config) == run
    assert create_run(config) == run
    assert json.loads(record.read_text())["uri"] == run.uri


def test_run_is_continued_at_a_new_address_of_its_server(config, migrated_database, tmp_path, monkeypatch, caplog):
    for name in ("server", "other"):
        (tmp_path / f"{name}.db").write_bytes(migrated_database)

    def connect(uri):
        return MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/{'other' if 'other' in uri else 'server'}.db")

    monkeypatch.setattr("m2f.cluster.tracking.tracking.connect", connect)
    monkeypatch.chdir(tmp_path)  # MLflow creates the artifacts there
    run = create_run(at(config, "http://mlflow:5000"))
    assert create_run(at(config, "http://mlflow:5000/")) == run
    moved = dataclasses.replace(run, uri="https://mlflow.svc")
    assert find_run(at(config, "https://mlflow.svc/")) == moved
    assert find_run(at(config, "http://other")) == run
    assert f"http://other does not contain MLflow run {run.run_id}" in caplog.text
    assert create_run(at(config, "https://mlflow.svc")) == moved
    assert json.loads(Path(config.run_folder, "tracking.json").read_text())["uri"] == moved.uri
    assert create_run(at(config, "http://other")).recreated


def send(run, *entries):
    """Append entries to a journal, send what the store accepts, and return the number of pending entries."""
    journal = Journal(run.journal("rank0"))
    for entry in entries:
        journal.append(entry)
    Sender(run, journal).send_pending()
    assert not journal.refused.exists()
    return len(journal.read(10))


def test_entries_wait_while_the_database_has_no_free_connection(run):
    engine = MlflowClient(tracking_uri=run.uri)._tracking_client.store.engine
    engine.pool._timeout = 0.1
    with ExitStack() as held:
        for _ in range(engine.pool.size() + engine.pool._max_overflow):
            held.enter_context(engine.connect())
        assert send(run, {"step": 1, "time_ms": 1, "metrics": {"loss": 1.0}}) == 1
    assert send(run) == 0
    assert history(run, "loss") == [(1, 1.0)]


def test_entries_wait_until_a_deleted_run_is_restored(run):
    client = MlflowClient(tracking_uri=run.uri)
    client.delete_run(run.run_id)
    assert send(run, {"step": 1, "time_ms": 1, "metrics": {"loss": 1.0}}) == 1
    client.restore_run(run.run_id)
    assert send(run) == 0
    assert history(run, "loss") == [(1, 1.0)]


class SmallProxy(BaseHTTPRequestHandler):
    """Accepts files of at most 1000 bytes."""

    def do_PUT(self):
        size = int(self.headers["Content-Length"])
        self.rfile.read(size)
        self.send_response(413 if size > 1000 else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_file_that_a_proxy_refuses_does_not_block_the_following_entries(run, tmp_path, caplog):
    (tmp_path / "large.bin").write_bytes(b"x" * 2000)
    with ThreadingHTTPServer(("127.0.0.1", 0), SmallProxy) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
        client = MlflowClient(tracking_uri=run.uri)
        experiment = client.create_experiment("proxied", f"http://127.0.0.1:{proxy.server_port}/artifacts")
        proxied = dataclasses.replace(run, run_id=client.create_run(experiment).info.run_id)
        tracking = Tracking(proxied, "driver", interval_s=0.05)
        tracking.log_artifact(tmp_path / "large.bin")
        tracking.log_metrics(1, {"loss": 1.0})
        assert tracking.finish("FINISHED", PATIENCE_S)
        proxy.shutdown()
    assert history(proxied, "loss") == [(1, 1.0)]
    assert "rejected 1 entries (413 Client Error" in caplog.text
    assert "large.bin" in proxied.journal("driver").with_suffix(".jsonl.refused").read_text()


def test_default_store_is_sqlite_in_output_and_a_bucket_requires_a_server(config, monkeypatch):
    assert tracking_uri(config) == f"sqlite:///{config.output}/mlflow.db"
    with pytest.raises(TrackingError, match=r"set tracking\.uri or MLFLOW_TRACKING_URI"):
        tracking_uri(dataclasses.replace(config, output="s3://bucket/runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    with pytest.raises(TrackingError, match=r"set tracking\.uri or MLFLOW_TRACKING_URI"):
        tracking_uri(dataclasses.replace(config, output="s3://bucket/runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        tracking_uri(config)
    assert "secret" not in str(caught.value)


def test_unreachable_server_at_the_first_start_raises_a_message(config, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TrackingError, match=r"cannot create or find an MLflow run at http://127\.0\.0\.1"):
        create_run(config)


@pytest.fixture
def server_run(migrated_database, tmp_path):
    """Create a run in the database of a server that is not started yet. Return the run and the server's port."""
    (tmp_path / "server.db").write_bytes(migrated_database)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/server.db")
    experiment = client.create_experiment("m2f", artifact_location="mlflow-artifacts:/m2f")
    port = free_port()
    run_id = client.create_run(experiment).info.run_id
    return TrackedRun(uri=f"http://127.0.0.1:{port}", run_id=run_id, spool=str(tmp_path / "spool")), port


def test_abandon_returns_while_the_store_does_not_respond(server_run, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = Tracking(server_run[0], "driver", interval_s=0.02)
    tracking.log_metrics(1, {"loss": 1.0})
    wait_until(lambda: tracking._sender.last_error)
    tracking.abandon()
    assert tracking._journal.read(1), "the points wait for the next holder"


@pytest.mark.slow
def test_server_outages_do_not_block_logging_and_lose_no_metrics(server_run, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    run, port = server_run
    store = f"sqlite:///{tmp_path}/server.db"  # readable while the server does not respond
    tracking = Tracking(run, "rank0", interval_s=0.05)
    for step in range(100):
        tracking.log_metrics(step, {"loss": float(step)})
    assert not tracking.close(timeout_s=0.2)  # the server is not running
    assert "are kept in" in caplog.text

    server = start_server(tmp_path, port)
    try:
        tracking = Tracking(run, "rank0", interval_s=0.05)
        wait_until(lambda: len(history(run, "loss", store)) == 100)
        os.killpg(server.pid, signal.SIGSTOP)  # accepts connections but does not respond
        (tmp_path / "results.json").write_text(json.dumps({"pq": 1}))
        started = time.monotonic()
        for step in range(100, 120):
            tracking.log_metrics(step, {"loss": float(step)})
        tracking.log_artifact(tmp_path / "results.json")
        assert time.monotonic() - started < 60  # less than the request timeout of 5 s for each of the 21 entries
        assert not tracking.close(timeout_s=0.5)
        os.killpg(server.pid, signal.SIGCONT)
        tracking = Tracking(run, "rank0", interval_s=0.05)
        assert tracking.close(PATIENCE_S)
        assert history(run, "loss", store) == [(n, float(n)) for n in range(120)]

        tracking = Tracking(run, "rank0", interval_s=0.05)
        for step in range(120, 300):  # the server is killed at step 150
            if step == 150:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
            tracking.log_metrics(step, {"loss": float(step)})
            time.sleep(0.005)
        server = start_server(tmp_path, port)
        tracking.log_metrics(300, {"loss": 300.0})
        assert tracking.close(PATIENCE_S)
        assert history(run, "loss", store) == [(n, float(n)) for n in range(301)]
        assert [a.path for a in MlflowClient(tracking_uri=run.uri).list_artifacts(run.run_id)] == ["results.json"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
