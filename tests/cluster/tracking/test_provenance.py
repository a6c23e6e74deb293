import dataclasses
import json
import subprocess

import mlflow
import pytest
from mlflow import MlflowClient

from m2f.cluster.recipe.load import parse_recipe
from m2f.cluster.tracking.journal import Journal
from m2f.cluster.tracking.provenance import code_facts, data_inputs
from m2f.cluster.tracking.tracking import create_run
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage

RECIPE = """
name: made
output: {folder}/runs
datasets:
  train: {{shards: {folder}/train}}
  val: {{shards: {folder}/val}}
  later: {{shards: {folder}/later}}
data: {{train: [{{dataset: train}}]}}
evaluation: {{sets: [{{dataset: val}}, {{dataset: later}}]}}
training: {{max_steps: 10}}
"""


def write_shards(url, num_images):
    source = SyntheticSource(num_images=num_images)
    write_dataset(open_reader(source), DatasetConfig(shards=str(url), source=source), Storage())


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_shards(tmp_path / "train", 3)
    write_shards(tmp_path / "val", 2)
    return parse_recipe(RECIPE.format(folder=tmp_path))


def git(folder, *arguments):
    names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", "-C", str(folder), *names, *arguments], check=True, capture_output=True)


def test_code_facts_contain_commit_branch_and_number_of_changed_files(tmp_path):
    assert code_facts(tmp_path) == {}
    git(tmp_path, "init")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-m", "a")
    clean = code_facts(tmp_path)
    assert (clean["code.branch"], clean["code.changed_files"], len(clean["code.commit"])) == ("main", "0", 40)
    (tmp_path / "a.py").write_text("2")
    (tmp_path / "new.py").write_text("2")
    assert code_facts(tmp_path) == clean | {"code.changed_files": "1"}


def test_run_logs_data_and_code_and_tags_later_changes(config, migrated_database, tmp_path, monkeypatch):
    monkeypatch.setattr("m2f.cluster.tracking.tracking.code_facts", lambda: {"code.commit": "abc"})
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs" / "mlflow.db").write_bytes(migrated_database)
    run = create_run(config)
    stored = MlflowClient(tracking_uri=run.uri).get_run(run.run_id)
    train, val = data_inputs(config, Storage())  # the shards of `later` do not exist yet
    assert [(entry.name, entry.context) for entry in (train, val)] == [("train", "training"), ("val", "evaluation")]
    inputs = {entry.dataset.name: entry for entry in stored.inputs.dataset_inputs}
    assert set(inputs) == {"train", "val"}
    assert inputs["train"].dataset.digest == train.fingerprint[:36]
    assert json.loads(inputs["train"].dataset.profile)["images"] == 3
    assert mlflow.data.get_source(inputs["val"].dataset).load() == str(tmp_path / "val")
    assert [(tag.key, tag.value) for tag in inputs["val"].tags] == [("mlflow.data.context", "evaluation")]
    assert stored.data.tags["code.commit"] == stored.data.tags["mlflow.source.git.commit"] == "abc"
    assert stored.data.tags["data.train"] == train.fingerprint

    monkeypatch.setattr("m2f.cluster.tracking.tracking.code_facts", lambda: {"code.commit": "def"})
    write_shards(tmp_path / "later", 4)
    datasets = {**config.datasets, "train": dataclasses.replace(config.datasets["train"], shards=f"{tmp_path}/later")}
    assert create_run(dataclasses.replace(config, datasets=datasets)) == run
    journal = Journal(tmp_path / "runs/made/tracking/driver.jsonl")
    tags = {entry["tag"]: entry["value"] for entry, _ in journal.read(100) if "tag" in entry}
    assert tags["resumed.code.commit"] == "def"
    assert tags["resumed.data.train"] != train.fingerprint
    assert "resumed.data.val" not in tags
