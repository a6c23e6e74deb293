"""Tests that URLs with secrets are rejected in recipes and for MLflow, S3 and Ray dashboards. See also test_urls.py."""

import dataclasses
import logging

import pytest

from m2f.cluster.cli import main
from m2f.cluster.compare.errors import CompareError
from m2f.cluster.compare.records import read_runs
from m2f.cluster.doctor.services import check_tracking
from m2f.cluster.recipe.load import dump_recipe, flatten, flatten_tree, load_recipe, parse_recipe
from m2f.cluster.recipe.stored import store_recipe
from m2f.cluster.submit.ray_jobs import JobClient, JobError
from m2f.cluster.tracking.record import RunRecord, read_record, write_record
from m2f.cluster.tracking.store import connect
from m2f.cluster.tracking.tracking import TrackingError, tracking_uri
from m2f.data_pipeline.config import StorageConfig
from m2f.data_pipeline.documents import parse_yaml
from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.errors import ConfigError

RECIPE = """
name: kept
output: {output}
datasets: {{train: {{shards: shards/train, source: {{kind: synthetic}}}}}}
data: {{train: [{{dataset: train}}]}}
training: {{max_steps: 10}}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "runs"))
    return path


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("tracking.uri", "https://tophush@host"),
        ("tracking.uri", "https://me:top/hush@host"),
        ("tracking.uri", "mysql+pymysql://me:tophush@host/db"),
        ("tracking.uri", "https://host/?token=tophush"),
        ("tracking.uri", "${OWN_URL}"),
        ("tracking.experiment", "https://tophush@host"),
        ("storage.endpoint_url", "http://me:tophush@host:9000"),
        ("output", "s3://AKIA:top/hush@bucket/runs"),
        ("model.weights", "s3://bucket/w.safetensors?X-Amz-Signature=tophush"),
        ("model.backbone.weights", "https://tophush@host/w.pkl"),
        ("model.backbone.options", "{inner: [https://tophush@host/w.pkl]}"),
        ("cluster.address", "ray://me:tophush@host:10001"),
        ("datasets.train.shards", "s3://tophush@bucket/train"),
        ("data.cache", "{folder: 'https://tophush@host', max_gb: 1}"),
    ],
)
def test_recipe_settings_reject_urls_with_secrets(recipe, setting, value, capsys, monkeypatch):
    monkeypatch.setenv("OWN_URL", "https://tophush@host")
    assert main(["train", str(recipe), f"{setting}={value}"]) == 2
    message = capsys.readouterr().err
    assert f"1 problem\n  `{setting}" in message
    assert "is stored with the run. Remove that part, and set credentials in the environment: MLFLOW_" in message
    assert "hush" not in message
    assert not (recipe.parent / "runs").exists()


def test_recipe_built_in_python_rejects_urls_with_secrets(recipe):
    config = load_recipe(recipe)
    with pytest.raises(ConfigError, match=r"`tracking\.uri`: the URL has a user"):
        dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, uri="https://tophush@host"))


def test_stored_recipe_with_a_secret_loads_without_it(recipe, caplog):
    """URLs that cannot be parsed are replaced, so that predict and export can still open the run."""
    config = load_recipe(recipe)
    text = dump_recipe(config).replace("uri: null", "uri: https://tophush@host")
    text = text.replace("endpoint_url: null", "endpoint_url: http://me:tophush")
    with caplog.at_level(logging.WARNING):
        stored = parse_recipe(text, source="runs/kept/recipe.yaml")
    assert (stored.tracking.uri, stored.storage.endpoint_url) == (
        "https://host",
        "(removed: it may have held a secret)",
    )
    assert "runs/kept/recipe.yaml: the URL in `tracking.uri` may contain a secret" in caplog.text
    assert "tophush" not in caplog.text
    assert "tophush" not in str(flatten_tree(parse_yaml(text)))
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=r"2 problems"):
        load_recipe(recipe)


def test_run_with_a_secret_in_its_stored_recipe_resumes(recipe):
    config = load_recipe(recipe, ["tracking.uri=https://host"])
    text = dump_recipe(config).replace("uri: https://host", "uri: https://tophush@host")
    storage = Storage()
    storage.put(f"{config.run_folder}/recipe.yaml", text.encode())
    assert store_recipe(storage, config, has_progress=True) == ()
    values = flatten(config) | {"tracking.uri": "https://tophush@host"}
    write_record(storage, config.run_folder, RunRecord("https://tophush@host", "7", values, {}))
    assert read_record(storage, config.run_folder) == RunRecord("https://host", "7", flatten(config), {})


@pytest.mark.parametrize("uri", ["https://tophush@host", "postgresql://host/db?password=tophush"])
def test_mlflow_uris_with_secrets_are_rejected(recipe, uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    config = load_recipe(recipe)
    for call in (lambda: tracking_uri(config), lambda: connect(uri)):
        with pytest.raises(TrackingError, match="MLFLOW_TRACKING_TOKEN") as caught:
            call()
        assert "tophush" not in str(caught.value)
    with pytest.raises((CompareError, TrackingError)) as caught:
        read_runs(["some run"], tracking=uri, experiment=None, query=None, step=None)
    assert "tophush" not in str(caught.value)
    for recipe_config in (config, None):
        finding = check_tracking(recipe_config)
        assert (finding.state, "tophush" in str(finding)) == ("failed", False)


def test_s3_endpoint_with_a_secret_in_the_environment_is_rejected(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://me:top/hush@127.0.0.1:9")
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY") as caught:
        Storage(StorageConfig()).get("s3://bucket/x")
    assert "hush@" not in str(caught.value)


def test_dashboard_address_with_a_password_is_rejected():
    with pytest.raises(JobError, match="RAY_AUTH_TOKEN") as caught:
        JobClient("http://me:tophush@127.0.0.1:9")
    assert "tophush" not in str(caught.value)
