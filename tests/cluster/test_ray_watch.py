"""What ends a driver where a process of Ray dies, with sockets in place of Ray."""

import contextlib
import socket

import pytest

from m2f.cluster import ray_cluster, ray_watch
from m2f.cluster.exit_status import RESTARTED
from m2f.cluster.ray_cluster import ClusterAwayError, local_or_existing
from m2f.cluster.recipe.config import ClusterConfig


class Ended(Exception):
    """In place of the end of this process."""


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Runs the watch until it would end the process; `gcs` and `raylet` are the listeners that it watches."""

    def end(message):
        raise Ended(message)

    monkeypatch.setattr(ray_watch, "_end", end)
    monkeypatch.setattr(ray_watch, "LOOK_S", 0.05)
    path = str(tmp_path / "raylet")
    with socket.create_server(("127.0.0.1", 0)) as gcs, socket.socket(socket.AF_UNIX) as raylet:
        raylet.bind(path)
        raylet.listen()

        def run(kill, patience_s=0.1, raylet_path=path):
            looks = 0

            def look():
                nonlocal looks
                looks += 1
                if looks == 3:
                    kill(gcs, raylet)
                return looks > 100

            ray_watch._watch(look, raylet_path, "127.0.0.1:{1}".format(*gcs.getsockname()), patience_s)

        yield run


def test_raylet_death_ends_the_driver_immediately(watch):
    def kill(gcs, raylet):
        connection, _ = raylet.accept()
        raylet.close()
        connection.close()

    with pytest.raises(Ended, match="raylet on this machine died"):
        watch(kill)


def test_closed_connection_to_a_live_raylet_is_reopened(watch):
    watch(lambda gcs, raylet: raylet.accept()[0].close())


@pytest.mark.parametrize("raylet_path", [None, "nowhere"])
def test_head_death_ends_the_driver(watch, raylet_path):
    with pytest.raises(Ended, match=r"its GCS at 127\.0\.0\.1:\d+ no longer accepts connections"):
        watch(lambda gcs, raylet: gcs.close(), raylet_path=raylet_path)


def test_unreachable_head_is_tolerated_within_the_patience(watch):
    watch(lambda gcs, raylet: gcs.close(), patience_s=1000.0)


def test_restarted_driver_waits_for_its_cluster(monkeypatch, capsys):
    answers = [OSError("refused"), OSError("refused"), None]

    def knock(address):
        if (answer := answers.pop(0)) is not None:
            raise answer

    monkeypatch.setenv(RESTARTED, "1")
    monkeypatch.setattr(ray_cluster, "_LOOK_S", 0.0)
    monkeypatch.setattr(ray_cluster, "knock", knock)
    monkeypatch.setattr(ray_cluster.ray, "init", lambda **settings: None)
    monkeypatch.setattr(ray_cluster, "watching", lambda is_ours: contextlib.nullcontext())
    with local_or_existing(ClusterConfig(address="head:6379"), 1):
        assert answers == []
    assert capsys.readouterr().err.count("cannot reach the Ray cluster at head:6379: refused; waiting") == 1


def test_cluster_that_stays_unreachable_is_an_outage(monkeypatch):
    monkeypatch.setenv(RESTARTED, "1")
    monkeypatch.setattr(ray_cluster, "RECONNECT_S", 0.0)
    with (
        pytest.raises(ClusterAwayError, match="when the cluster is back"),
        local_or_existing(ClusterConfig(address="127.0.0.1:9"), 1),
    ):
        pass
