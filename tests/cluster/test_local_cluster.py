"""Who may reach a Ray cluster that m2f starts for itself: this user, on this machine."""

import os
import tempfile
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import ray

from m2f.cluster import ray_cluster
from m2f.cluster.doctor.services import check_ray_token
from m2f.cluster.ray_cluster import local_or_existing
from m2f.cluster.ray_private import dashboard_url
from m2f.cluster.recipe.config import ClusterConfig
from tests.waiting import wait_until

PARTS = ("gcs_server", "dashboard", "raylet", "DashboardAgent", "RuntimeEnvAgent")


def is_loopback(address: str) -> bool:
    return ip_address(address.removeprefix("::ffff:")).is_loopback


def listeners() -> dict[tuple[str, int], str]:
    """Addresses that this process and its descendants listen on, with their commands."""
    me = psutil.Process()
    found: dict[tuple[str, int], str] = {}
    for process in (me, *me.children(recursive=True)):
        try:
            sockets, command = process.net_connections("inet"), " ".join(process.cmdline())[:120]
        except psutil.NoSuchProcess:  # it has ended meanwhile
            continue
        found |= {(s.laddr.ip, s.laddr.port): command for s in sockets if s.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.cluster
@pytest.mark.slow
def test_local_cluster_listens_on_loopback_and_uses_a_private_folder(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = listeners()
    with local_or_existing(ClusterConfig(), num_cpus=1, dashboard=True):
        assert ray.get(ray.remote(num_cpus=0)(ray.util.get_node_ip_address).remote()) == "127.0.0.1"
        wait_until(lambda: all(any(name in c for c in listeners().values()) for name in PARTS), "all of Ray's ports")
        opened = {address: command for address, command in listeners().items() if address not in before}
        outside = {address: command for address, command in opened.items() if not is_loopback(address[0])}
        assert not outside, outside
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        private = session.parents[1]
        assert private.name.startswith("m2f-ray-")
        assert private.stat().st_mode & 0o777 == 0o700, "Ray opens the folders below to everybody"
        assert max(len(os.fsencode(path)) for path in (session / "sockets").iterdir()) <= 107
        assert check_ray_token(dashboard_url()).state == "ok"
        assert ray.get(ray.remote(num_cpus=0)(lambda: os.nice(0)).remote()) == os.nice(0), "nice value of the driver"
    assert not private.exists()


def test_a_long_tmpdir_is_not_used_for_sockets(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert len(os.fsencode(tmp_path)) > ray_cluster.MAX_PLACE_BYTES
    with ray_cluster._private_folder() as folder:
        assert folder.startswith("/tmp/m2f-ray-")
        assert Path(folder).parent.stat().st_mode & 0o777 == 0o700
    assert not Path(folder).parent.exists()
