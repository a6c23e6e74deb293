"""Tests of the checks of `m2f doctor`, for healthy and faulty machines and services."""

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from email.utils import formatdate
from http.client import BadStatusLine
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from m2f.cluster.cli import main
from m2f.cluster.doctor.doctor import exit_status, print_findings, run_checks
from m2f.cluster.doctor.finding import Finding
from m2f.cluster.doctor.machine import (
    check_compiler,
    check_disk,
    check_gpus,
    check_op_cache,
    check_shared_memory,
    check_versions,
)
from m2f.cluster.doctor.services import (
    check_clock,
    check_data,
    check_ray_token,
    check_run_folder,
    check_shards,
    check_tracking,
    skew_finding,
)
from m2f.cluster.recipe.load import load_recipe
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage
from tests.waiting import PATIENCE_S

RECIPE = """
name: patient
output: {folder}/runs
datasets: {{train: {{shards: "{folder}/shards"}}}}
data: {{train: [{{dataset: train}}]}}
training: {{max_steps: 10}}
"""
UNREACHABLE_URL = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    dataset = DatasetConfig(shards=str(folder / "shards"), source=SyntheticSource(num_images=2))
    write_dataset(open_reader(dataset.source), dataset, Storage())
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder / "recipe.yaml"


@pytest.fixture
def clean_environment(monkeypatch, tmp_path):
    """Remove this machine's settings from the environment, and set fake AWS keys."""
    for name in ("MLFLOW_TRACKING_URI", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "test")


def doctor(capsys, *words):
    status = main(["doctor", *map(str, words)])
    return status, capsys.readouterr().out


@pytest.mark.slow
def test_a_healthy_machine_passes_every_check(capsys, recipe, clean_environment):
    """The test runs all checks without mocks, including the all-reduce of two processes."""
    status, out = doctor(capsys, recipe)
    assert status == 0, out
    assert "gloo all-reduce over 2 processes" in out
    assert " failed" not in out
    assert not list((recipe.parent / "runs").rglob("*-*")), "the probe of the run folder is deleted"


def test_an_unreachable_run_folder_fails_quickly_with_a_remedy(recipe, clean_environment):
    config = load_recipe(recipe, ["output=s3://bucket/runs", f"storage.endpoint_url={UNREACHABLE_URL}"])
    started = time.monotonic()
    finding = check_run_folder(config)
    assert time.monotonic() - started < 120  # the default timeouts are longer
    assert (finding.state, UNREACHABLE_URL in finding.detail) == ("failed", True)
    assert "storage.endpoint_url" in finding.remedy


def test_unreachable_shards_fail(recipe, clean_environment):
    finding = check_shards(
        load_recipe(recipe, ["datasets.train.shards=s3://bucket/train", f"storage.endpoint_url={UNREACHABLE_URL}"])
    )
    assert (finding.state, UNREACHABLE_URL in finding.detail, "JSON" in finding.detail) == ("failed", True, False)


def test_an_unwritable_run_folder_fails(recipe, tmp_path, clean_environment):
    (tmp_path / "file").write_text("not a folder")
    assert check_run_folder(load_recipe(recipe, [f"output={tmp_path}/file"])).state == "failed"


def test_missing_shards_fail_with_the_command_that_writes_them(recipe, tmp_path):
    assert check_shards(load_recipe(recipe)).state == "ok"
    finding = check_shards(load_recipe(recipe, [f"datasets.train.shards={tmp_path}"]))
    assert (finding.state, finding.remedy) == ("failed", "run m2f shard RECIPE train")


def test_data_that_do_not_match_the_model_are_a_warning(recipe, tmp_path):
    assert check_data(load_recipe(recipe)).state == "ok"
    finding = check_data(load_recipe(recipe, ["model.transformer_decoder.num_queries=1"]))
    assert (finding.state, finding.detail.startswith("train: 2 of 2 images have more objects")) == ("warning", True)
    finding = check_data(load_recipe(recipe, [f"datasets.train.shards={tmp_path}"]))
    assert (finding.state, finding.detail) == ("skipped", "the shards of train cannot be read")
    assert check_data(None).state == "skipped"


def test_an_mlflow_server_that_is_down_fails_quickly(recipe, clean_environment):
    started = time.monotonic()
    finding = check_tracking(load_recipe(recipe, [f"tracking.uri={UNREACHABLE_URL}"]))
    assert time.monotonic() - started < 120  # the default timeouts are longer
    assert (finding.state, UNREACHABLE_URL in finding.detail) == ("failed", True)
    assert "start the server" in finding.remedy


def test_a_run_in_s3_without_a_tracking_server_fails(recipe, clean_environment):
    finding = check_tracking(load_recipe(recipe, ["output=s3://bucket/runs"]))
    assert (finding.state, "MLFLOW_TRACKING_URI" in finding.detail) == ("failed", True)


def test_shared_memory_of_64_mib_fails(clean_environment):
    """The test mounts a small /dev/shm in a mount namespace."""
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    check = [sys.executable, str(Path(__file__).with_name("shared_memory_main.py"))]
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", *check]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    if "not permitted" in result.stderr or "unshare" in result.stderr:
        pytest.skip("needs the right to make a mount namespace")
    assert result.stdout.startswith("failed 0.1 GiB free in /dev/shm"), result.stderr


def test_shared_memory_of_this_machine_suffices():
    assert check_shared_memory().state in ("ok", "warning")


def test_a_missing_compiler_fails_only_where_it_is_needed(recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert check_compiler(None).state == "ok"
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert check_compiler(None).state == "warning"
    assert check_compiler(load_recipe(recipe)).state == "ok", "a recipe that needs none"
    finding = check_compiler(load_recipe(recipe, ["training.compile=true"]))
    assert (finding.state, finding.remedy) == ("failed", "apt-get install g++")
    assert "training.compile needs a C++ compiler" in finding.detail
    finding = check_compiler(load_recipe(recipe, ["cluster.num_gpus_per_worker=1"]))
    assert (finding.state, "GPU kernels need a C compiler" in finding.detail) == ("failed", True)


def test_fewer_gpus_than_needed_fail(recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert check_gpus(load_recipe(recipe), None).state == "ok"
    assert check_gpus(load_recipe(recipe, ["cluster.num_gpus_per_worker=1"]), None).state == "failed"
    assert check_gpus(load_recipe(recipe, ["cluster.num_gpus_per_worker=1"]), 0).state == "ok", "a node without GPUs"


def test_an_unwritable_kernel_cache_is_a_warning(monkeypatch, tmp_path):
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    assert check_op_cache().state == "ok"
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "below"))
    finding = check_op_cache()
    assert (finding.state, finding.remedy) == ("warning", "set TRITON_CACHE_DIR to a writable folder")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    finding = check_op_cache()
    assert (finding.state, finding.detail) == ("ok", f"{tmp_path}, {tmp_path}/home/.cache/m2f/compiled")


def test_a_nearly_full_disk_warns_and_a_full_one_fails(recipe, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * 2**30))
    assert check_disk(None).state == "warning"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    assert check_disk(load_recipe(recipe)).state == "failed"


def test_small_cache_in_the_temporary_folder_does_not_lower_its_required_space(recipe, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**29))
    cache = f"data.cache={{folder: {tempfile.gettempdir()}, max_gb: 0.1}}"
    assert check_disk(load_recipe(recipe, ["output=s3://bucket/runs", cache])).state == "failed"


def test_libraries_of_unsupported_versions_fail(monkeypatch):
    assert check_versions().state == "ok"
    monkeypatch.setattr("m2f.cluster.doctor.machine.metadata.version", lambda name: "0.1")
    finding = check_versions()
    assert (finding.state, "torch 0.1 (needs >=2.11)" in finding.detail) == ("failed", True)


def test_an_untested_version_of_ray_is_a_warning(monkeypatch):
    monkeypatch.setattr(
        "m2f.cluster.doctor.machine.metadata.version", lambda name: "1.3.0" if name == "hotcoco" else "99.0"
    )
    finding = check_versions()
    assert (finding.state, "ray 99.0" in finding.detail, ">=2.60" in finding.remedy) == ("warning", True, True)


def test_a_missing_token_fails_and_disabled_tokens_warn(monkeypatch, clean_environment, tmp_path):
    assert check_ray_token().state == "ok"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert check_ray_token().state == "failed"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    assert check_ray_token().state == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert check_ray_token().state == "warning"


@pytest.mark.parametrize(
    ("http_status", "state", "words"),
    [
        (200, "failed", "accepts jobs without a token"),
        (401, "ok", "rejects requests without a token"),
        (403, "ok", "rejects requests without a token"),
        (500, "warning", "returned HTTP 500 to a request without a token"),
    ],
)
def test_token_check_sends_a_request_without_a_token(http_status, state, words, monkeypatch):
    """The check ignores this process's environment, because the cluster may have been started with another one."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hush")

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Authorization"] is None
            self.send_response_only(http_status if self.path == "/api/jobs/" else 404)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        finding = check_ray_token(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert (finding.state, words in finding.detail) == (state, True)


def test_unreachable_dashboard_is_a_warning():
    assert check_ray_token(UNREACHABLE_URL).state == "warning"


@pytest.mark.parametrize(("ahead", "state"), [(0, "ok"), (60, "warning"), (-3600, "failed")])
def test_clock_skew_warns_and_then_fails(recipe, ahead, state):
    class Server(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response_only(404)
            self.send_header("Date", formatdate(time.time() - ahead, usegmt=True))
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        finding = check_clock(load_recipe(recipe, [f"tracking.uri={url}"]))
        server.shutdown()
    assert finding.state == state
    assert ("ahead of" in finding.detail) == (ahead > 0)


def test_the_clock_check_is_skipped_if_the_server_does_not_speak_http(recipe, monkeypatch):
    def refuse(*arguments, **options):
        raise BadStatusLine("SSH-2.0")

    monkeypatch.setattr("m2f.cluster.doctor.services.urlopen", refuse)
    assert check_clock(load_recipe(recipe, ["tracking.uri=http://host:22"])).state == "skipped"


def test_the_clock_check_is_skipped_without_a_server(recipe):
    assert check_clock(load_recipe(recipe, [f"tracking.uri={UNREACHABLE_URL}"])).state == "skipped"
    assert skew_finding(-6, "x").detail == "6 s behind x"


def test_a_check_that_raises_is_a_failed_finding():
    def check_nothing():
        raise KeyError("oops")

    (finding,) = run_checks([check_nothing], where="node")
    assert (finding.check, finding.state, finding.where) == ("nothing", "failed", "node")
    assert "KeyError: 'oops'" in finding.detail


def test_findings_are_printed_as_a_table_and_set_the_exit_status():
    findings = [Finding("a", "ok", "fine [really]"), Finding("b", "failed", "broken", "repair it", where="10.0.0.1")]
    console = Console(width=80, record=True, file=StringIO())
    print_findings(findings, console)
    text = console.export_text()
    assert "fine [really]" in text
    assert "-> repair it" in text
    assert "10.0.0.1" in text
    assert "1 ok, 1 failed" in text
    assert (exit_status(findings), exit_status(findings[:1])) == (1, 0)
