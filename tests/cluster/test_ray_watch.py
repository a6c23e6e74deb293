"""Tests of the watchdog that ends a driver when a Ray process dies. Plain sockets replace Ray's processes."""

import contextlib
import socket

import pytest

from m2f.cluster import ray_cluster, ray_watch
from m2f.cluster.exit_status import RESTARTED_VARIABLE
from m2f.cluster.ray_cluster import ClusterOutageError, existing_or_local_cluster
from m2f.cluster.recipe.config import ClusterConfig


class ProcessExit(Exception):
    """Raised instead of ending this process."""


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Return a function that runs the watchdog and calls its argument `kill` with the GCS and raylet sockets."""

    def raise_exit(message):
        raise ProcessExit(message)

    monkeypatch.setattr(ray_watch, "_exit_with_outage", raise_exit)
    monkeypatch.setattr(ray_watch, "POLL_S", 0.05)
    path = str(tmp_path / "raylet")
    with socket.create_server(("127.0.0.1", 0)) as gcs, socket.socket(socket.AF_UNIX) as raylet:
        raylet.bind(path)
        raylet.listen()

        def run(kill, patience_s=0.1, raylet_path=path):
            polls = 0

            def is_stopped():
                nonlocal polls
                polls += 1
                if polls == 3:
                    kill(gcs, raylet)
                return polls > 100

            ray_watch._watch(is_stopped, raylet_path, "127.0.0.1:{1}".format(*gcs.getsockname()), patience_s)

        yield run


def test_raylet_death_ends_the_driver_immediately(watch):
    def kill(gcs, raylet):
        connection, _ = raylet.accept()
        raylet.close()
        connection.close()

    with pytest.raises(ProcessExit, match="raylet on this machine died"):
        watch(kill)


def test_closed_connection_to_a_live_raylet_is_reopened(watch):
    watch(lambda gcs, raylet: raylet.accept()[0].close())


@pytest.mark.parametrize("raylet_path", [None, "nowhere"])
def test_head_death_ends_the_driver(watch, raylet_path):
    with pytest.raises(ProcessExit, match=r"its GCS at 127\.0\.0\.1:\d+ accepts no connections"):
        watch(lambda gcs, raylet: gcs.close(), raylet_path=raylet_path)


def test_unreachable_head_is_tolerated_within_the_patience(watch):
    watch(lambda gcs, raylet: gcs.close(), patience_s=1000.0)


def test_restarted_driver_waits_for_its_cluster(monkeypatch, capsys):
    outcomes = [OSError("refused"), OSError("refused"), None]

    def require_listening(address):
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    monkeypatch.setenv(RESTARTED_VARIABLE, "1")
    monkeypatch.setattr(ray_cluster, "_RETRY_S", 0.0)
    monkeypatch.setattr(ray_cluster, "require_listening", require_listening)
    monkeypatch.setattr(ray_cluster.ray, "init", lambda **settings: None)
    monkeypatch.setattr(ray_cluster, "end_if_ray_dies", lambda is_ours: contextlib.nullcontext())
    with existing_or_local_cluster(ClusterConfig(address="head:6379"), 1):
        assert outcomes == []
    assert capsys.readouterr().err.count("cannot reach the Ray cluster at head:6379: refused; waiting") == 1


def test_cluster_that_stays_unreachable_is_an_outage(monkeypatch):
    monkeypatch.setenv(RESTARTED_VARIABLE, "1")
    monkeypatch.setattr(ray_cluster, "RECONNECT_S", 0.0)
    with (
        pytest.raises(ClusterOutageError, match="when the cluster is back"),
        existing_or_local_cluster(ClusterConfig(address="127.0.0.1:9"), 1),
    ):
        pass
