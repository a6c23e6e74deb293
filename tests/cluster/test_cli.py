from __future__ import annotations

import hashlib
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from safetensors.torch import save_file

from m2f.cluster.cli import SECTIONS, VERBS, main, parse_verb
from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.predict.choose_checkpoint import choose_checkpoint
from m2f.cluster.recipe.load import load_recipe
from m2f.cluster.train.compose import compose_job
from m2f.cluster.verbs.arguments import split_overrides
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.errors import ConfigError
from m2f.trainer.checkpoint.folder import CheckpointManifest, FileEntry, checkpoint_url, pin
from tests.waiting import PATIENCE_S

RECIPE = """
name: small
output: {folder}/runs
datasets:
  train: {{shards: {folder}/shards, source: {{kind: synthetic, num_images: 6}}}}
  absent: {{shards: {folder}/absent}}
data:
  train: [{{dataset: train}}]
model:
  backbone: {{name: resnet10t, norm: group, options: {{channels: [16, 16, 32, 32]}}}}
  pixel_decoder: {{conv_dim: 32, mask_dim: 32, num_layers: 1, num_heads: 2, feedforward_dim: 32}}
  transformer_decoder: {{num_queries: 8, num_layers: 1, hidden_dim: 32, num_heads: 2, feedforward_dim: 32}}
  postprocess: {{object_threshold: 0.0, overlap_threshold: 0.0}}
training: {{max_steps: 10}}
evaluation: {{shortest_edge: 64, max_size: 96}}
"""
NEW_SHARDS = "datasets.train.shards={folder}/others"
NO_CLUSTER = "cluster.address=127.0.0.1:9"
HEAVY = ("torch", "ray", "mlflow", "pyarrow", "boto3", "cv2", "numpy", "pydantic", "rich", "deepspeed")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Write a recipe and the shards of its training set, and return the recipe's path."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    dataset = DatasetConfig(shards=str(folder / "shards"), source=SyntheticSource(num_images=6))
    write_dataset(open_reader(dataset.source), dataset, Storage())
    return folder / "recipe.yaml"


def run(capsys, *words):
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_imports_no_heavy_package(words):
    command = [sys.executable, Path(__file__).with_name("help_main.py"), ",".join(HEAVY), *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 0, result.stderr
    assert "usage: m2f" in result.stdout


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["config", "--explain"]])
def test_a_closed_pipe_ends_without_a_traceback(words):
    command = [sys.executable, "-m", "m2f.cluster.cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # `| head -0` may close it before the first line
    assert (process.stderr.read(), process.wait(PATIENCE_S)) == ("", 0)
    process.stderr.close()


@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT])
def test_a_verb_that_a_closed_pipe_stops_is_not_done(stderr, tmp_path):
    command = [sys.executable, "-m", "m2f.cluster.cli", "init", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=tmp_path)
    process.stdout.close()
    message = process.stderr.read() if process.stderr else None
    assert process.wait(PATIENCE_S) not in (0, 2)
    assert message is None or message.startswith("m2f init: stopped, because the reader of its output ended")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize(
    ("verb", "full", "status", "expected"),
    [("config", "out", 0, 1), ("config", "err", 0, 0), ("train", "out", 0, 0), ("train", "both", 69, 69)],
)
def test_verb_whose_result_a_full_disk_refuses_is_not_done(verb, full, status, expected):
    command = [sys.executable, "-m", "tests.cluster.full_disk_main", verb, str(status)]
    with open("/dev/full", "w") as device:
        out = device if full in ("out", "both") else subprocess.PIPE
        err = device if full in ("err", "both") else subprocess.PIPE
        result = subprocess.run(command, stdout=out, stderr=err, text=True, timeout=PATIENCE_S, check=False)
    assert result.returncode == expected
    if full == "out":
        assert result.stderr.splitlines()[0].startswith("lines are missing in stdout, because its disk or terminal")
        assert result.stderr.splitlines()[1:] == ["a warning"]


def test_another_broken_pipe_is_an_error(monkeypatch, capfd):
    def run_verb(args):
        raise BrokenPipeError("a worker has ended")

    monkeypatch.setattr("m2f.cluster.verbs.config.run", run_verb)
    with pytest.raises(BrokenPipeError, match="a worker has ended"):
        main(["config"])


def test_help_takes_less_than_a_second_of_cpu_time():
    """The test measures CPU time, because wall time depends on other processes."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "m2f.cluster.cli", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 1.0, times


def test_the_overview_lists_every_verb_in_one_section(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(f"  {verb} " in out for verb in VERBS)
    assert len(VERBS) == sum(map(len, SECTIONS.values()))  # no verb is in two sections
    assert run(capsys)[0] == 2


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_ends_with_an_example_that_the_verb_accepts(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    *_, heading, example = capsys.readouterr().out.splitlines()
    assert heading == "example:"
    program, *words = example.split()
    assert (program, words[0]) == ("m2f", verb)
    parse_verb(words)  # raises SystemExit for unknown options


def test_unknown_verb_suggests_a_similar_one(capsys):
    assert run(capsys, "trian") == (2, "", "m2f: no such verb `trian`; did you mean `m2f train`?\n")
    assert "verbs: demo, init, config" in run(capsys, "xyz")[2]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["config", "none.yaml"], "m2f config: none.yaml: cannot read the recipe"),
        (["config"], "m2f config: no recipe given"),
        (["config", "RECIPE", "training.max_step=1"], "did you mean `max_steps`?"),
        (["config", "--explain", "trainin"], "did you mean `training`?"),
        (["train", "RECIPE", "data.train.0.dataset=absent", "--launcher", "local"], "write the shards first"),
        (["stats", "RECIPE", "other"], "no data set 'other' under `datasets` (known: train, absent)"),
        (["stats", "RECIPE", "absent"], "dataset.json does not exist"),
        (["preview", "RECIPE", "train", "absent"], "preview takes one data set, not 2: train, absent"),
        (["shard", "RECIPE", "absent"], "set datasets.absent.source"),
        (["shard", "RECIPE", "train", NEW_SHARDS, NO_CLUSTER], "cannot reach the Ray cluster at 127.0.0.1:9"),
        (["eval", "RECIPE"], "has no checkpoint; train first"),
        (["eval", "RECIPE", "--checkpoint", "12"], "has no checkpoint; train first"),
        (["predict", "RECIPE", "nowhere.jpg", "--output", "out"], "nowhere.jpg: no such image"),
        (["predict", "RECIPE", "", "--output", "out"], "m2f predict: an image name is empty; give a file"),
    ],
)
def test_user_error_prints_one_message_and_returns_status_2(capsys, recipe, tmp_path, words, expected):
    words = [recipe if word == "RECIPE" else word.format(folder=tmp_path) for word in words]
    status, _, err = run(capsys, *words)
    assert status == 2
    assert expected in err
    assert "Traceback" not in err


def test_empty_name_of_a_model_is_refused_with_a_remedy(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["predict", "", "photo.jpg", "--output", "out"])
    assert "m2f predict: error: argument RECIPE|FOLDER: is empty; give a recipe or a folder" in capsys.readouterr().err


def test_config_prints_a_recipe_that_loads_again(capsys, recipe, tmp_path):
    _, first, _ = run(capsys, "config", recipe, "training.max_steps=7")
    (tmp_path / "again.yaml").write_text(first)
    assert run(capsys, "config", tmp_path / "again.yaml") == (0, first, "")


def test_config_explains_without_a_recipe(capsys):
    status, out, _ = run(capsys, "config", "--explain")
    assert status == 0
    assert out.startswith("## Recipe")
    assert "kind: multi_step" in run(capsys, "config", "--explain", "training.schedule")[1]


def test_options_and_overrides_may_come_in_any_order(capsys, recipe, tmp_path):
    sheet = tmp_path / "sheet.png"
    status, out, _ = run(capsys, "preview", recipe, "--images", "2", "train", "--output", sheet, "seed=3")
    assert (status, out) == (0, f"{sheet}: 2 of 6 images of train\n")
    assert cv2.imread(str(sheet)).shape[2] == 3


def test_stats_prints_the_classes(capsys, recipe):
    status, out, _ = run(capsys, "stats", recipe, "train")
    assert status == 0
    assert out.startswith("train: 6 images in 1 shard")
    assert "% pixels" in out


def test_shard_without_a_source_is_an_error(capsys, recipe, tmp_path):
    text = re.sub(r", source: \{.*?\}", "", recipe.read_text())
    (tmp_path / "recipe.yaml").write_text(text)
    status, _, err = run(capsys, "shard", tmp_path / "recipe.yaml")
    assert status == 2
    assert "recipe.yaml has a source; set datasets.train.source" in err


@pytest.mark.parametrize(
    ("ending", "status"), [("finished", 0), ("failed", 1), ("stopped", 3), ("drained", ExitStatus.DRAINED)]
)
def test_demo_and_train_have_the_same_exit_statuses(ending, status, monkeypatch):
    demo = SimpleNamespace(run_demo=lambda *_: SimpleNamespace(status=ending))
    monkeypatch.setitem(sys.modules, "m2f.cluster.demo", demo)
    assert main(["demo"]) == status


def test_a_negative_number_of_pictures_is_refused(capsys, recipe):
    status, _, err = run(capsys, "analyze", "attention", recipe, "--pictures", "-1")
    assert (status, err.splitlines()[-1]) == (2, "m2f analyze: --pictures is -1; it must be at least 0")


def test_shard_reports_a_finished_data_set(capsys, recipe):
    status, out, _ = run(capsys, "shard", recipe)
    assert status == 0
    assert out.startswith("train: 6 samples in 1 shard")
    assert "no new shards written" in out


def test_job_gets_the_class_count_of_the_data_for_its_task(recipe):
    assert compose_job(load_recipe(recipe)).model.num_classes == 10
    job = compose_job(load_recipe(recipe, ["data.task=instance"]))
    assert job.model.num_classes == 6
    assert job.shards == (str(recipe.parent / "shards"),)
    with pytest.raises(ConfigError, match="have 10 classes for the task panoptic; remove the setting"):
        compose_job(load_recipe(recipe, ["model.num_classes=4"]))


@pytest.mark.slow
def test_local_training_writes_a_checkpoint_and_a_finished_mlflow_run(recipe, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    from m2f.cluster.tracking.tracking import find_run

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    overrides = [
        f"output={tmp_path}",
        "training.max_steps=2",
        "training.global_batch=1",
        "training.micro_batch=1",
        "training.log_every_steps=1",
        "data.augment.size=64",
        "data.workers=0",
        "model.loss.num_points=64",
    ]
    command = [sys.executable, "-m", "m2f.cluster.cli", "train", str(recipe), "--launcher", "local", *overrides]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 0, result.stderr
    assert f"run finished: {tmp_path}/small\ncurves: mlflow ui " in result.stdout
    config = load_recipe(recipe, overrides)
    assert choose_checkpoint(config, Storage(), None).name == "step_00000002"
    with pytest.raises(ConfigError, match="no such file or folder"):
        choose_checkpoint(config, Storage(), "absent.pt")
    run = find_run(config)
    client = MlflowClient(tracking_uri=run.uri)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.run_id, "train/loss/total")] == [1, 2]


@pytest.fixture(scope="module")
def weights(recipe):
    """Write random weights of the recipe's model and return their path."""
    from m2f.model.mask2former import build_model

    path = recipe.parent / "weights.safetensors"
    save_file(build_model(compose_job(load_recipe(recipe)).model).state_dict(), path)
    return path


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(2):
        cv2.imwrite(str(folder / f"{i}.jpg"), random.integers(0, 255, (40, 60 + i, 3), dtype=np.uint8))
    return folder


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_predict_writes_pictures_and_files(capsys, recipe, weights, images, tmp_path, task):
    from pycocotools import mask as coco_masks

    out = tmp_path / "out"
    status, text, _ = run(capsys, "predict", recipe, images, "--checkpoint", weights, "--output", out, "--task", task)
    assert status == 0
    assert text.startswith("2 of 2 images")
    assert cv2.imread(str(out / "overlays/0.png")) is not None
    categories = json.loads((out / "categories.json").read_text())
    if task == "panoptic":
        annotation = json.loads((out / "panoptic.json").read_text())["annotations"][1]
        colors = cv2.imread(str(out / "panoptic" / annotation["file_name"]))[..., ::-1].astype(np.int64)
        ids, areas = np.unique(colors @ [1, 256, 65536], return_counts=True)
        found = {i: a for i, a in zip(ids.tolist(), areas.tolist(), strict=True) if i}
        assert found == {s["id"]: s["area"] for s in annotation["segments_info"]}
        assert found
    elif task == "instance":
        entries = json.loads((out / "instances.json").read_text())
        things = {c["id"] for c in categories if c["isthing"]}
        assert {e["image_id"] for e in entries} == {1, 2}
        assert {e["category_id"] for e in entries} <= things
        assert coco_masks.decode(entries[-1]["segmentation"]).shape == (40, 61)
    else:
        labels = cv2.imread(str(out / "labels/1.png"), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (40, 61)
        assert set(np.unique(labels)) <= {c["id"] for c in categories}


def test_predict_continues_after_a_broken_image_and_reports_it(capsys, recipe, weights, images, tmp_path):
    (images / "broken.jpg").write_bytes((images / "0.jpg").read_bytes()[:300])
    out = tmp_path / "out"
    status, text, err = run(capsys, "predict", recipe, images, "--checkpoint", weights, "--output", out)
    assert status == 1
    assert "2 of 3 images" in text
    assert "broken.jpg: the image cannot be read" in err


def test_existing_file_with_an_equals_sign_is_not_an_override(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "id=7.jpg").touch()
    words = ["id=7.jpg", "seed=3", "other.jpg"]
    assert split_overrides(words) == (["id=7.jpg", "other.jpg"], ["seed=3"])


def test_paths_and_urls_with_an_equals_sign_are_not_overrides():
    images = ["s3://box/day=2026-01-01/", "frames/cam=1/*.jpg"]
    override = "datasets.my-set.shards=s3://box/day=1"
    assert split_overrides([*images, override]) == (images, [override])


def test_predict_without_images_is_refused(capsys, recipe, tmp_path):
    status, _, err = run(capsys, "predict", recipe, "seed=3", "--output", tmp_path / "out")
    assert status == 2
    assert "no image is given, because seed=3 overrides a setting" in err


def test_predict_rejects_a_url_as_output(capsys, recipe, images):
    status, _, err = run(capsys, "predict", recipe, images, "--output", "s3://box/out")
    assert status == 2
    assert "--output is s3://box/out" in err


def test_checkpoint_verb_lists_and_verifies_checkpoints(capsys, recipe):
    storage, folder = Storage(), load_recipe(recipe).run_folder
    for step in (5, 10):
        url = checkpoint_url(folder, step)
        storage.put(f"{url}/weights.safetensors", b"weights")
        entry = FileEntry(7, hashlib.sha256(b"weights").hexdigest())
        manifest = CheckpointManifest(step, 2, 1, {"weights.safetensors": entry})
        storage.put(f"{url}/manifest.json", manifest.to_json())
    pin(storage, checkpoint_url(folder, 5), "evaluation")
    status, out, _ = run(capsys, "checkpoint", "ls", recipe)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["step", "10", "5"]
    assert out.splitlines()[2].endswith("complete, kept for evaluation")
    storage.put(f"{checkpoint_url(folder, 10)}/weights.safetensors", b"weighty")
    assert run(capsys, "checkpoint", "ls", recipe)[0] == 0  # it checks only sizes
    status, out, _ = run(capsys, "checkpoint", "verify", recipe)
    assert status == 1
    assert "damaged: " in out.splitlines()[1]
    assert "every byte verified" in out.splitlines()[2]
    assert run(capsys, "checkpoint", "verify", recipe, "--step", "5")[0] == 0


def test_weights_are_exported_from_checkpoints(capsys, recipe, tmp_path):
    export = ("checkpoint", "export", recipe, "--step", "5")
    storage, folder = Storage(), load_recipe(recipe).run_folder
    url, files = checkpoint_url(folder, 5), {"weights.safetensors": b"weights", "ema.safetensors": b"average"}
    for name, content in files.items():
        storage.put(f"{url}/{name}", content)
    entries = {name: FileEntry(7, hashlib.sha256(content).hexdigest()) for name, content in files.items()}
    storage.put(f"{url}/manifest.json", CheckpointManifest(5, 2, 1, entries).to_json())
    for options, content in (([], b"average"), (["--no-average"], b"weights")):
        target = tmp_path / "out" / f"{content.decode()}.safetensors"
        assert run(capsys, *export, "--output", target, *options)[0] == 0
        assert target.read_bytes() == content
        assert len(list(target.parent.iterdir())) == 1 + (content == b"weights")
    status, _, err = run(capsys, *export, "--output", target)
    assert status == 2
    assert "give the name of a new file" in err
    storage.put(f"{url}/ema.safetensors", b"damaged")
    status, _, err = run(capsys, *export, "--output", tmp_path / "b.safetensors")
    assert status == 2
    assert "checksum of ema.safetensors" in err
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "recipe.yaml", "--world"],
        ["preview", "recipe.yaml", "--images"],
        ["verify", "shards", "--threads"],
        ["index", "tars", "--output", "here", "--categories", "classes.json", "--threads"],
    ],
)
def test_counts_below_1_are_refused(capsys, words):
    for value, problem in (
        ("0", "must be at least 1, not 0"),
        ("-1", "must be at least 1"),
        ("x", "invalid count value"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*words, value])
        assert f"argument {words[-1]}: {problem}" in capsys.readouterr().err


def test_plan_prints_predictions_and_rejects_invalid_options(recipe, capsys):
    status, out, _ = run(capsys, "plan", recipe, "--world", 4, "--batch", 2)
    assert status == 0
    assert out.startswith("4 ranks with 2 images each on 1 machine, 160 images/s in total")
    assert "epoch         6 images in" in out
    assert re.search(r"GPU memory +\d+\.\d\d GB with \d+ images of \d+ x \d+ at once.*ZeRO 1 on 4 ranks", out)
    assert re.search(r"up to \d+ images at once fit into a GPU of 80 GB", out)
    status, _, err = run(capsys, "plan", recipe, "--gpu-gb", 0)
    assert status == 2
    assert "--gpu-gb is 0.0" in err


def test_plan_works_without_shards(recipe, tmp_path, capsys):
    new = tmp_path / "new.yaml"
    new.write_text(recipe.read_text().replace(f"{recipe.parent}/shards", str(tmp_path / "none")))
    status, out, err = run(capsys, "plan", new)
    assert status == 0, err
    assert "no shards yet: assuming" in err
    assert "training.precision is auto; assuming bf16_autocast" in err
    assert out.startswith("GPU memory ")


FILES = ["--truth", "a", "--predictions", "b", "--truth-masks", "c", "--prediction-masks", "d"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["train", "recipe.yaml", "--laucher", "local"],
            "unrecognized arguments: --laucher local; did you mean --launcher?",
        ),
        (["score", "panoptic", *FILES, "--reprt", "x"], "unrecognized arguments: --reprt x; did you mean --report?"),
        (["score", "panoptc"], "did you mean panoptic?"),
        (["train", "recipe.yaml", "--launcher", "locl"], "did you mean local?"),
    ],
)
def test_misspelt_option_or_choice_suggests_the_closest_one(capsys, words, expected):
    with pytest.raises(SystemExit):
        main(words)
    assert expected in capsys.readouterr().err
