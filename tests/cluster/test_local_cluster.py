"""Tests that a Ray cluster started by m2f is reachable only from this machine and uses a private folder."""

import os
import tempfile
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import ray

from m2f.cluster import ray_cluster
from m2f.cluster.doctor.services import check_ray_token
from m2f.cluster.ray_cluster import existing_or_local_cluster
from m2f.cluster.ray_private import dashboard_url
from m2f.cluster.recipe.config import ClusterConfig
from tests.waiting import wait_until

SERVICES = ("gcs_server", "dashboard", "raylet", "DashboardAgent", "RuntimeEnvAgent")


def is_loopback(address: str) -> bool:
    return ip_address(address.removeprefix("::ffff:")).is_loopback


def listeners() -> dict[tuple[str, int], str]:
    """Return the listening addresses of this process and its descendants, with the command of each."""
    this_process = psutil.Process()
    found: dict[tuple[str, int], str] = {}
    for process in (this_process, *this_process.children(recursive=True)):
        try:
            sockets, command = process.net_connections("inet"), " ".join(process.cmdline())[:120]
        except psutil.NoSuchProcess:  # the process has just ended
            continue
        found |= {(s.laddr.ip, s.laddr.port): command for s in sockets if s.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.cluster
@pytest.mark.slow
def test_local_cluster_listens_on_loopback_and_uses_a_private_folder(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = listeners()
    with existing_or_local_cluster(ClusterConfig(), num_cpus=1, dashboard=True):
        assert ray.get(ray.remote(num_cpus=0)(ray.util.get_node_ip_address).remote()) == "127.0.0.1"
        wait_until(lambda: all(any(name in c for c in listeners().values()) for name in SERVICES), "all of Ray's ports")
        opened = {address: command for address, command in listeners().items() if address not in before}
        exposed = {address: command for address, command in opened.items() if not is_loopback(address[0])}
        assert not exposed, exposed
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        private_folder = session.parents[1]
        assert private_folder.name.startswith("m2f-ray-")
        assert private_folder.stat().st_mode & 0o777 == 0o700, "the folders below are readable to everybody"
        assert max(len(os.fsencode(path)) for path in (session / "sockets").iterdir()) <= 107
        assert check_ray_token(dashboard_url()).state == "ok"
        assert ray.get(ray.remote(num_cpus=0)(lambda: os.nice(0)).remote()) == os.nice(0), "nice value of the driver"
    assert not private_folder.exists()


def test_a_long_tmpdir_is_not_used_for_sockets(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert len(os.fsencode(tmp_path)) > ray_cluster.MAX_TEMP_FOLDER_BYTES
    with ray_cluster._private_folder() as folder:
        assert folder.startswith("/tmp/m2f-ray-")
        assert Path(folder).parent.stat().st_mode & 0o777 == 0o700
    assert not Path(folder).parent.exists()
