"""Tests of the results that `m2f compare` reads from a run that restarted from a checkpoint before an evaluated one."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from m2f.cluster.compare.records import read_runs
from m2f.cluster.evaluation.queue import Entry
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.checkpoint.folder import AVERAGE, MANIFEST, WEIGHTS, CheckpointManifest, FileEntry, checkpoint_url

OLD, NEW, RAW = "aa" * 32, "bb" * 32, "cc" * 32


@pytest.fixture
def run(tmp_path):
    """Write a run folder whose results of step 100 belong to withdrawn weights, with a newer result of new ones."""
    (tmp_path / "recipe.yaml").write_text("name: run\n")
    for name, weights, quality in (("val", OLD, 50.0), ("val.1234", NEW, 60.0), ("val.5678", None, 70.0)):
        content = {"step": 100, "fingerprint": "f", "subset": None, "num_images": 3, "metrics": {"PQ": quality}}
        content |= {"per_class": [], "settings": {"weights": weights}}
        folder = tmp_path / "evaluations" / "step_00000100" / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(content))
    entries = [Entry(100, "", 0, "withdrawn", commit="first"), Entry(100, "", 1, "dropped", commit="second")]
    (tmp_path / "evaluations" / "queue.json").write_text(json.dumps([asdict(entry) for entry in entries]))
    return str(tmp_path)


def compared_sets(run):
    (record,) = read_runs([run], tracking=None, experiment=None, query=None, step=None)
    assert record.notes[1:] == (
        "not compared, because the run restarted from an earlier checkpoint: results of step 100",
    )
    return set(record.results)


@pytest.mark.parametrize("names", [{WEIGHTS: NEW}, {WEIGHTS: RAW, AVERAGE: NEW}])
def test_results_of_the_weights_that_a_repeated_step_has_now_are_compared(run, names):
    assert compared_sets(run) == set()
    files = {name: FileEntry(1, sha256) for name, sha256 in names.items()}
    manifest = join(checkpoint_url(run, 100, 2), MANIFEST)
    Storage().put(manifest, CheckpointManifest(100, 1, 0, files).to_json())
    assert compared_sets(run) == {"val.1234"}
    Storage().put(manifest, b"{")
    assert compared_sets(run) == set()
