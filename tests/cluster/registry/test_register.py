"""Tests of `m2f register`, including predictions of the registered model in a separate environment."""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

import m2f
from m2f.cluster.cli import main
from m2f.cluster.predict.choose_checkpoint import open_recipe
from m2f.cluster.tracking.registered import CHECKPOINT_FOLDER, model_folder
from m2f.cluster.tracking.store import TrackingError
from m2f.cluster.tracking.tracking import find_run
from m2f.data_pipeline.image_file import decode_rgb
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.folder import verify_sizes
from tests.cluster.registry.registered_run import make_run
from tests.mlflow_server import free_port
from tests.waiting import PATIENCE_S, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]  # raised by MLflow


@pytest.fixture(scope="module")
def run_config(tmp_path_factory, migrated_database):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield make_run(tmp_path_factory.mktemp("registry"), migrated_database)


@pytest.fixture
def folder(run_config, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return run_config.run_folder


def client_of(folder):
    run = find_run(open_recipe(folder, ())[0])
    return MlflowClient(tracking_uri=run.uri), run


def register(folder, *words):
    return main(["register", folder, *words])


def test_checkpoint_is_registered_once_and_predicts_in_another_environment(folder, tmp_path, capfd):
    assert register(folder, "--checkpoint", "4", "--alias", "champion", "--precision", "0.05") == 0
    out = capfd.readouterr().out
    assert "step 4 registered: cells, version 1" in out
    assert "models:/cells@champion" in out
    client, run = client_of(folder)
    version = client.get_model_version_by_alias("cells", "champion")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert (version.run_id, version.tags["m2f.step"]) == (run.run_id, "4")
    assert "mlflow.model.isExternal" not in model.tags
    assert {metric.dataset_name for metric in model.metrics} == {"val"}
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "cells", "version": 1}]
    assert (Path(folder) / "checkpoints/step_00000004-1/pins/registered").is_file()

    # Registering under another alias keeps the version and uploads nothing.
    uploaded = registry_files(folder)
    assert register(folder, "--checkpoint", "4", "--alias", "candidate", "--precision", "0.05") == 0
    assert "registered (already uploaded): cells, version 1" in capfd.readouterr().out
    assert client.get_model_version_by_alias("cells", "candidate").version == version.version
    assert registry_files(folder) == uploaded
    weights = [path for path in uploaded if path.endswith("weights.safetensors")]
    assert len(weights) == 1
    assert not [path for path in uploaded if "engine" in path or path.endswith((".pkl", ".pt"))]

    # The wheel contains the running code, and the requirements are pinned.
    package = Path(weights[0]).parents[2]
    (wheel,) = (package / "code").glob("m2f-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("m2f/cluster/registry/wheel.py") == (m2f.HOME / "cluster/registry/wheel.py").read_bytes()
    needed = (package / "requirements.txt").read_text().split()
    assert f"code/{wheel.name}" in needed
    assert f"numpy=={np.__version__}" in needed
    assert all(
        "==" in requirement and "+" not in requirement for requirement in needed if not requirement.startswith("code/")
    )

    # The model must load without the shards and the run folder, and from another working directory.
    moved = Path(folder).rename(Path(folder).with_name("moved away"))
    try:
        outcome = load_in_new_environment(run.uri, "models:/cells@champion", tmp_path, package)
    finally:
        moved.rename(folder)
    check_outcome(outcome)


def registry_files(folder):
    return sorted(str(path) for path in Path(folder).parent.glob("mlartifacts/models/**/*") if path.is_file())


def load_in_new_environment(uri, address, working_folder, package):
    from m2f.cluster.registry.package import example_jpeg

    (working_folder / "example.jpg").write_bytes(example_jpeg())
    script = Path(__file__).with_name("load_registered.py")
    done = subprocess.run(
        [
            create_environment(package, working_folder / "environment"),
            script,
            address,
            working_folder / "example.jpg",
            package / "serving_input_example.json",
        ],
        cwd=working_folder,
        env={"MLFLOW_TRACKING_URI": uri, "PATH": "/usr/bin:/bin", "HOME": str(working_folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def create_environment(package, home):
    """Create an environment with symlinks to the packages in the model's requirements.txt. Return its Python."""
    venv.create(home, symlinks=True, with_pip=False)
    (site,) = home.glob("lib/python*/site-packages")
    for line in (package / "requirements.txt").read_text().split():
        if line.startswith("code/"):
            continue
        found = distribution(line.partition("==")[0])
        for top in {file.parts[0] for file in found.files if file.parts[0] not in ("..", "__pycache__")}:
            if not top.endswith(".pth") and not (site / top).exists():
                (site / top).symlink_to(Path(found.locate_file(top)))
    return home / "bin/python"


def check_outcome(outcome):
    assert outcome["present"] == []
    assert ".whl/m2f/" in outcome["program"]
    assert outcome["same"]
    assert outcome["served"] == [True] * 3
    assert outcome["example"] == ["height", "instances", "panoptic", "semantic", "width"]
    assert outcome["metadata"] == "panoptic"
    files, urls, broken, grey = outcome["refused"]
    assert "not a base64 image" in files
    assert "images from 127.0.0.1 are not allowed (allowed hosts: none)" in urls
    assert "not a readable image" in broken
    assert "[4, 4]" in grey
    first, *later = outcome["cpu_s"]  # CPU time, because the machine may be busy
    assert first < 10
    assert min(later) < 0.3
    response = outcome["response"]
    assert (response["height"], response["width"]) == (96, 128)
    png = decode_rgb(base64.b64decode(response["panoptic"]["png"])).astype(np.int64)
    ids = png[..., 0] + 256 * png[..., 1] + 65536 * png[..., 2]
    assert set(np.unique(ids)) - {0} == {segment["id"] for segment in response["panoptic"]["segments_info"]}
    assert len(response["instances"]) <= outcome["all_instances"]
    for found in response["instances"]:
        assert set(found) == {"category_id", "segmentation", "score", "category", "bbox"}


def test_registered_model_loads_as_a_checkpoint_folder(folder, tmp_path):
    assert register(folder, "--checkpoint", "4", "--alias", "champion") == 0
    _, run = client_of(folder)
    found = model_folder("models:/cells@champion", run.uri, str(tmp_path))
    assert str(found).endswith(CHECKPOINT_FOLDER)
    manifest = verify_sizes(Storage(), str(found))
    assert set(manifest.files) == {"weights.safetensors", "identity.json", "recipe.yaml"}
    model = m2f.load(found)
    assert len(model.names) == 10
    result = model.predict(np.zeros((64, 80, 3), np.uint8))
    assert result.size == (64, 80)
    for address, words in (("models:/cells@nobody", "check name and alias"), ("models:/nothing/1", "check name")):
        with pytest.raises(TrackingError, match=words):
            model_folder(address, run.uri)


def test_only_a_better_checkpoint_gets_the_alias(folder, capfd):
    assert register(folder, "--checkpoint", "4", "--name", "judged", "--if-better", "best", "--set", "val") == 0
    assert "nothing to compare with" in capfd.readouterr().err
    client, _ = client_of(folder)
    before = client.get_model_version_by_alias("judged", "best").version
    assert register(folder, "--checkpoint", "4", "--name", "judged", "--if-better", "best", "--set", "val") == 1
    out = capfd.readouterr()
    assert "val/PQ of cells minus best (version 1): +0.00 PQ, 95 % interval +0.00 to +0.00 over 20 images" in out.out
    assert "step 4 is not better than judged@best, so it is not registered" in out.err
    assert client.get_model_version_by_alias("judged", "best").version == before
    assert len(client.search_model_versions("name = 'judged'")) == 1
    assert register(folder, "--checkpoint", "4", "--name", "judged", "--if-better", "best", "--set", "other") == 2
    assert "--set is other, but step 4 of" in capfd.readouterr().err


@pytest.mark.parametrize("words", [("--if-better", "best"), ("--alias", "best", "--precision", "0.05")])
def test_results_of_a_retrained_step_are_rejected(folder, words, capfd):
    (results,) = Path(folder).glob("evaluations/step_00000008/val/results.json")
    before = results.read_text()
    content = json.loads(before)
    content["settings"]["weights"] = "f" * 64
    results.write_text(json.dumps(content))
    try:
        assert register(folder, "--checkpoint", "8", "--name", "again", *words) == 2
    finally:
        results.write_text(before)
    error = capfd.readouterr().err
    assert "the results of val at step 8 belong to different weights (SHA-256 ffffffffffff)" in error
    assert not (Path(folder) / "checkpoints/step_00000008-1/pins").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --alias"),
        (
            ("--alias", "a", "tracking.experiment=x", "evaluation.shortest_edge=640"),
            "evaluation.shortest_edge=640: a registered model uses the settings that its checkpoint",
        ),
        (
            ("--alias", "a", "--checkpoint", __file__),
            f"{__file__} is not a checkpoint of",
        ),
        (
            ("--alias", "a", "--allow-url", "https://u:key@pictures.example:81/x"),
            "give --allow-url pictures.example:81",
        ),
        (("--alias", "a", "--allow-url", "two hosts"), "give a host such as host.example"),
        (("--alias", "a", "--checkpoint", "5"), "no checkpoint of step 5; available steps: 8, 4"),
        (("--alias", "a", "--checkpoint", "8", "--precision", "1.5"), "--precision is 1.5"),
        (
            ("--alias", "a", "--checkpoint", "8", "--set", "test", "--precision", "0.5"),
            "/cells was not evaluated on it (sets: val); give one of these",
        ),
        (("--alias", "a", "--checkpoint", "8", "--set", "tset"), "--set is tset, but step 8 of"),
        # No version has this alias yet, so nothing is compared.
        (("--if-better", "new", "--checkpoint", "8", "--set", "tset"), "--set is tset, but step 8 of"),
    ],
)
def test_register_errors_print_one_message_and_change_nothing(folder, words, message, capfd):
    assert register(folder, *words) == 2
    assert message in capfd.readouterr().err
    assert not (Path(folder) / "checkpoints/step_00000008-1/pins").exists()


def test_failed_registration_unpins_the_checkpoint(folder, monkeypatch):
    def raise_no_space(*words):
        raise OSError("no space")

    monkeypatch.setattr("m2f.cluster.registry.register.build_package", raise_no_space)
    with pytest.raises(OSError, match="no space"):
        register(folder, "--checkpoint", "8", "--alias", "champion", "--name", "failed")
    assert not list((Path(folder) / "checkpoints/step_00000008-1").glob("pins/*"))


def test_uploads_have_time_and_names_may_contain_quotes(folder, monkeypatch, capfd):
    limits = []
    upload = MlflowClient.log_model_artifacts

    def upload_and_note(*words):
        limits.append(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT"))
        upload(*words)

    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    monkeypatch.setattr(MlflowClient, "log_model_artifacts", upload_and_note)
    for _ in range(2):
        assert register(folder, "--checkpoint", "8", "--name", "bob's", "--precision", "0.1") == 0
    assert "600" in limits
    assert "registered (already uploaded): bob's, version 1" in capfd.readouterr().out


def test_changed_code_registers_a_new_version(folder, monkeypatch, capfd):
    assert register(folder, "--checkpoint", "4", "--name", "changed") == 0
    monkeypatch.setattr("m2f.cluster.registry.wheel._WHEEL", b"Wheel-Version: 1.0\nTag: py3-none-any\n")
    assert register(folder, "--checkpoint", "4", "--name", "changed") == 0
    assert "step 4 registered: changed, version 2" in capfd.readouterr().out
    client, _ = client_of(folder)
    first, second = (client.get_model_version("changed", number) for number in "12")
    assert "- val/PQ: " in first.description
    assert second.description == first.description
    first_metrics, second_metrics = (metrics_of(client, version) for version in (first, second))
    assert ("val/PQ", 4) in {(key, step) for key, step, *_ in first_metrics}
    assert second_metrics == first_metrics


def metrics_of(client, version):
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    return {
        (metric.key, metric.step, metric.value, metric.timestamp, metric.dataset_name, metric.dataset_digest)
        for metric in model.metrics
    }


def test_registered_models_work_after_the_store_was_moved(folder, tmp_path):
    assert register(folder, "--checkpoint", "4", "--alias", "champion") == 0
    moved = shutil.copytree(Path(folder).parent, tmp_path / "moved")  # a copy, because other tests use the original
    config, _ = open_recipe(str(moved / "cells"), ())
    run = find_run(config)  # updates the paths of a moved store; every process that writes to a run calls it
    assert run.uri == f"sqlite:///{moved}/mlflow.db"
    client = MlflowClient(tracking_uri=run.uri)
    version = client.get_model_version_by_alias("cells", "champion")
    assert version.tags["m2f.checkpoint.url"] == str(moved / "cells/checkpoints/step_00000004-1")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.artifact_location.startswith((moved / "mlartifacts").as_uri())
    assert model.tags["m2f.checkpoint.url"].startswith(str(moved))
    assert client.get_model_version_download_uri("cells", version.version).startswith((moved / "mlartifacts").as_uri())


@pytest.mark.soak
def test_mlflow_server_serves_the_registered_model(folder, tmp_path):
    """`load_registered.py` calls the same server code in its own process."""
    assert register(folder, "--checkpoint", "4", "--alias", "champion") == 0
    _, run = client_of(folder)
    (example,) = Path(folder).parent.glob("mlartifacts/models/*/artifacts/serving_input_example.json")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "-p", str(port)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": run.uri, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "-m", "models:/cells@champion"],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until(lambda: request(port, "GET", "/ping")[0] == 200, "the server", pause_s=0.5)
        status, body = request(port, "POST", "/invocations", example.read_bytes())
        assert status == 200, body
        assert set(json.loads(body)["predictions"][0]) == {"height", "width", "panoptic", "instances", "semantic"}
        status, body = request(port, "POST", "/invocations", b'{"dataframe_records": [{"image": "/etc/passwd"}]}')
        assert status == 400
        assert b"file paths are not accepted" in body
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(PATIENCE_S)


def request(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    except OSError:
        return 0, b""
    finally:
        connection.close()
