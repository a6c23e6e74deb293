"""Uncommitted checkpoints and unfinished writes: the next start aborts the writes, and `gc` deletes both."""

import os
import signal
import subprocess
import sys

import boto3
import pytest

from m2f.cluster.cli import main
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.checkpoint.commits import repair_commits
from m2f.trainer.checkpoint.folder import DAMAGED, MANIFEST, CheckpointManifest, checkpoint_url, pin
from m2f.trainer.checkpoint.lease import hold_lease

RECIPE = """
name: run
output: {output}
datasets: {{train: {{shards: shards/train}}}}
data: {{train: [{{dataset: train}}]}}
training: {{max_steps: 10}}
"""


@pytest.fixture(params=["disk", "s3"])
def output(request, tmp_path):
    return str(tmp_path / "runs") if request.param == "disk" else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


@pytest.fixture
def run_folder(output):
    return join(output, "run")


@pytest.fixture
def recipe(output, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(output=output))
    return str(path)


def begin_write(url):
    """Leave an unfinished write: by a process that kills itself, or by a multipart upload of which one part exists."""
    if "://" not in url:
        done = subprocess.run([sys.executable, "-m", "tests.trainer.checkpoint.killed_while_writing", url], check=False)
        assert done.returncode == -signal.SIGKILL
        return
    bucket, _, key = url.removeprefix("s3://").partition("/")
    client = boto3.session.Session().client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"half")


def save(storage, run_folder, step, lease, name=MANIFEST):
    url = checkpoint_url(run_folder, step, lease)
    storage.put(join(url, "weights.safetensors"), b"weights")
    if name:
        storage.put(join(url, name), CheckpointManifest(step, 1, 1, {}).to_json())
    return url


def test_start_aborts_only_writes_of_earlier_leases(run_folder):
    storage = Storage()
    with hold_lease(storage, run_folder):
        pass
    begin_write(join(checkpoint_url(run_folder, 4, 1), "engine/states.pt"))
    begin_write(join(run_folder, "evaluations/step_00000004/report.html"))
    with hold_lease(storage, run_folder) as lease:
        begin_write(join(checkpoint_url(run_folder, 6, lease.number), "engine/states.pt"))
        begin_write(join(f"{run_folder}-2", "checkpoints/step_00000004-1/engine/states.pt"))  # of another run
        assert len(storage.list_unfinished(run_folder)) == 3
        repair_commits(storage, run_folder, evaluates=False)
    remaining = [write.url.removeprefix(run_folder) for write in storage.list_unfinished(run_folder)]
    assert len(remaining) == 2
    assert [url for url in remaining if url.startswith("/checkpoints/step_00000006-2/engine/")]
    assert len(storage.list_unfinished(f"{run_folder}-2")) == 1


def test_gc_lists_then_deletes_only_leftovers(run_folder, recipe, capsys):
    storage = Storage()
    with hold_lease(storage, run_folder):
        kept = [save(storage, run_folder, 2, 1)]
    with hold_lease(storage, run_folder):  # this lease records the commit of step 2 as valid
        kept.append(save(storage, run_folder, 4, 2))
        late = save(storage, run_folder, 4, 1)
        never, damaged = save(storage, run_folder, 6, 2, name=""), save(storage, run_folder, 3, 1, name=DAMAGED)
        kept.append(save(storage, run_folder, 8, 1, name=""))
        pin(storage, kept[-1], "mine")
    begin_write(join(never, "engine/states.pt"))
    begin_write(join(run_folder, "recipe.yaml"))
    before = storage.list(run_folder)
    assert main(["checkpoint", "gc", recipe, "--dry-run"]) == 0
    listed = capsys.readouterr().out
    for line in (
        f"folder  {late}: committed after another process took over the run",
        f"folder  {never}: never committed",
        f"folder  {damaged}: set aside as damaged",
        "5 to delete; nothing was changed",
    ):
        assert line in listed
    assert storage.list(run_folder) == before
    assert len(storage.list_unfinished(run_folder)) == 2
    assert main(["checkpoint", "gc", recipe]) == 0
    assert "5 deleted" in capsys.readouterr().out
    assert storage.list_unfinished(run_folder) == ()
    folders = {url.rpartition("/weights")[0] for url in storage.list(run_folder) if url.endswith("weights.safetensors")}
    assert folders == set(kept)
    assert main(["checkpoint", "gc", recipe]) == 0
    assert "0 deleted" in capsys.readouterr().out


def test_gc_deletes_nothing_of_a_run_that_is_training(run_folder, recipe, capsys):
    storage = Storage()
    with hold_lease(storage, run_folder) as lease:
        url = save(storage, run_folder, 4, lease.number, name="")
        begin_write(join(run_folder, "recipe.yaml"))
        assert main(["checkpoint", "gc", recipe, "--dry-run"]) == 0
        captured = capsys.readouterr()
        assert "0 to delete" in captured.out
        assert "a process may be training here" in captured.err
        assert main(["checkpoint", "gc", recipe]) == 2
        assert "is training in this folder" in capsys.readouterr().err
        assert storage.list(url)


def test_gc_of_a_missing_run_reports_an_error(run_folder, recipe, capsys):
    assert main(["checkpoint", "gc", recipe]) == 2
    assert f"{run_folder} is empty or does not exist" in capsys.readouterr().err
    assert not Storage().list(run_folder)
