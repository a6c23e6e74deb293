from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest

from m2f.cluster.cli import main
from m2f.cluster.own_data.choices import Machine, choose_settings
from m2f.cluster.own_data.sets import DataFormat, SourceSet, split_from_path
from m2f.cluster.own_data.survey import Survey, fault_kind, survey
from m2f.cluster.own_data.write_recipe import InitOptions, build_datasets
from m2f.cluster.recipe.load import load_recipe
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.readers import open_dataset
from m2f.data_pipeline.readers.files import DARK_IMAGE
from m2f.data_pipeline.sources import CocoInstancesSource, SyntheticSource
from m2f.model.export.hugging_face import write_hugging_face_config
from m2f.model.weights.architecture import require_same_architecture
from tests.tool_exports import EXPORTS

KINDS = {"roboflow": "coco_instances", "label_studio": "coco_instances", "cvat_coco": "coco_instances"}
TASKS = {"label_maps": "semantic", "color_maps": "semantic", "huggingface": "panoptic"}


@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_becomes_a_recipe_that_loads(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "set"
    folder.mkdir()
    EXPORTS[name](folder)
    assert main(["init", "set"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-2:] == ["  m2f shard set.yaml", "  m2f train set.yaml"]
    assert len((tmp_path / "set.yaml").read_text().splitlines()) <= 40
    config = load_recipe(tmp_path / "set.yaml")
    assert config.data.task == TASKS.get(name, "instance")
    assert set(config.datasets) == {"train", "val"}
    sources = [dataset.source for dataset in config.datasets.values()]
    assert {source.kind for source in sources if source is not None} == {KINDS.get(name, name)}
    train, val = (set(open_dataset(config.datasets[part])[0].keys) for part in ("train", "val"))
    assert len(train | val) == 6
    assert not train & val
    assert main(["config", "set.yaml"]) == 0


def test_instance_data_can_be_used_for_the_semantic_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    EXPORTS["yolo_seg"](tmp_path / "set")
    assert main(["init", "set", "--task", "semantic"]) == 0
    reader, _ = open_dataset(load_recipe(tmp_path / "set.yaml").datasets["train"])
    assert [c.name for c in reader.categories.for_task("semantic")] == ["cell", "dirt", "background"]


def test_the_added_class_has_another_name_than_the_classes_of_the_export(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    EXPORTS["yolo_seg"](tmp_path / "set")
    path = tmp_path / "set/data.yaml"
    path.write_text(path.read_text().replace("cell", "background"))
    assert main(["init", "set", "--task", "semantic"]) == 0
    assert "pixels without an object get the class 'unlabelled'" in capsys.readouterr().out
    reader, _ = open_dataset(load_recipe(tmp_path / "set.yaml").datasets["train"])
    assert [c.name for c in reader.categories.categories] == ["background", "dirt", "unlabelled"]


def test_label_maps_of_stuff_are_refused_for_the_instance_task(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    EXPORTS["label_maps"](tmp_path / "set")
    assert main(["init", "set", "--task", "instance"]) == 2
    assert "train has 3 classes but no thing" in capsys.readouterr().err
    assert not (tmp_path / "set.yaml").exists()


@pytest.mark.parametrize(("task", "limit"), [("instance", 150), ("semantic", 100)])
def test_predictions_keep_all_objects_of_crowded_images(task, limit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    EXPORTS["yolo_seg"](tmp_path / "set")
    for path in (tmp_path / "set").rglob("labels/**/*.txt"):
        path.write_text("0 0.1 0.1 0.5 0.1 0.5 0.5\n" * 80)
    assert main(["init", "set", "--task", task]) == 0
    model = load_recipe(tmp_path / "set.yaml").model
    assert model.transformer_decoder.num_queries == 150
    assert model.postprocess.max_instances == limit


@pytest.mark.parametrize("address", ["hub", "folder"])
def test_published_weights_determine_the_model(address, tmp_path, monkeypatch):
    """As in configs/finetune, the recipe's architecture matches the weights that it starts from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    EXPORTS["yolo_seg"](tmp_path / "set")
    model = load_recipe("finetune_swin_l").model
    published = tmp_path / "published"
    published.mkdir()
    write_hugging_face_config(published, model, ["cell", "other"], {}, 640, 1066)
    if address == "hub":
        monkeypatch.setattr("m2f.cluster.own_data.init.hub_folder", lambda text, weights: published)
    weights = "hub:someone/swin-large" if address == "hub" else str(published)
    assert main(["init", "set", "--weights", weights]) == 0
    config = load_recipe(tmp_path / "set.yaml")
    assert config.model.weights == weights
    require_same_architecture(published, config.model, weights)
    assert config.model.transformer_decoder.num_queries == 200
    assert len((tmp_path / "set.yaml").read_text().splitlines()) <= 40


def test_several_matching_formats_require_the_format_option(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    for name in ("yolo_seg", "label_studio"):
        EXPORTS[name](tmp_path / "set")
    assert main(["init", "set"]) == 2
    message = capsys.readouterr().err
    assert "--format yolo_seg" in message
    assert "--format coco_instances" in message
    assert main(["init", "set", "--format", "yolo_seg"]) == 0
    assert main(["init", "set", "--format", "yolo_seg"]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--form", "yolo_seg"], ["--form=yolo_seg"]])
def test_form_still_selects_the_format_and_names_the_new_option(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    for name in ("yolo_seg", "label_studio"):
        EXPORTS[name](tmp_path / "set")
    assert main(["init", *words, "set"]) == 0
    assert capsys.readouterr().err.count("--form is now called --format; use --format\n") == 1
    source = load_recipe(tmp_path / "set.yaml").datasets["train"].source
    assert source is not None
    assert source.kind == "yolo_seg"


@pytest.mark.parametrize(("words", "suggestion"), [(["--fom", "voc"], "--format"), (["--formats", "voc"], "--format")])
def test_form_is_neither_listed_nor_suggested(words, suggestion, capsys):
    with pytest.raises(SystemExit):
        main(["init", "--help"])
    assert "--form " not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["init", "set", *words])
    assert f"did you mean {suggestion}?" in capsys.readouterr().err


def test_faults_are_counted_by_kind(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    EXPORTS["label_studio"](tmp_path / "set")
    path = tmp_path / "set/result.json"
    document = json.loads(path.read_text())
    for entry in document["annotations"][:3]:
        entry["category_id"] = 77
    path.write_text(json.dumps(document))
    (tmp_path / "set/images/im5.png").write_bytes(b"no image")
    assert main(["init", "set"]) == 0
    printed = capsys.readouterr().out
    assert "3 x annotation N: category_id is N, which `categories` does not define" in printed
    assert printed.splitlines()[-2] == "  m2f shard set.yaml --skip-bad"


def test_images_without_objects_are_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    EXPORTS["label_studio"](tmp_path / "set")
    path = tmp_path / "set/result.json"
    document = json.loads(path.read_text())
    empty = document["images"][0]["id"]
    document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] != empty]
    path.write_text(json.dumps(document))
    assert main(["init", "set"]) == 0
    assert "1 of 6 images without a segment: training leaves them out" in capsys.readouterr().out


def test_counts_of_large_sets_name_the_images_that_were_read(tmp_path, monkeypatch):
    """Missing files are found among all images, and other faults only in the images that are read."""
    monkeypatch.setattr("m2f.cluster.own_data.survey._NUM_SURVEYED", 2)
    EXPORTS["label_studio"](tmp_path)
    for number in (1, 4):
        (tmp_path / f"images/im{number}.png").unlink()
    source = CocoInstancesSource(images=str(tmp_path), instances_json=f"{tmp_path}/result.json")
    lines = survey([open_dataset(DatasetConfig(shards="unused", source=source))]).lines()
    assert lines[1] == "segments by class in the 2 images read: cell 2, dirt 2"
    assert lines[2] == "2 faults; the images that were not read may have more:"
    assert lines[3] == "  2 x does not exist; the annotations refer to it"


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_the_added_class_is_counted_in_images_with_objects(task, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    EXPORTS["yolo_seg"](tmp_path / "set")
    assert main(["init", "set", "--task", task]) == 0
    assert "segments by class: cell 6, dirt 6, background 6" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["cell", "dirt"], ["dirt", "cell", "hair"], ["dirt", "hair"]])
def test_training_sets_need_one_with_all_classes(names, tmp_path, capsys, monkeypatch):
    """The first training set defines the classes. Training refuses others that the first does not have."""
    monkeypatch.chdir(tmp_path)
    for task in ("task1", "task2"):
        (tmp_path / "set" / task).mkdir(parents=True)
        EXPORTS["label_studio"](tmp_path / "set" / task)
    path = tmp_path / "set/task2/result.json"
    document = json.loads(path.read_text())
    document["categories"] = [{"id": k, "name": name} for k, name in enumerate(names)]
    path.write_text(json.dumps(document))
    if names == ["dirt", "hair"]:
        assert main(["init", "set"]) == 2
        message = capsys.readouterr().err
        assert "the files define different classes, and none has all of them. Give every file" in message
        assert f"\n  {path}: dirt, hair" in message
        assert not (tmp_path / "set.yaml").exists()
        return
    assert main(["init", "set"]) == 0
    first, second = (part.dataset for part in load_recipe(tmp_path / "set.yaml").data.train)
    assert (first, second) == (("train2", "train") if "hair" in names else ("train", "train2"))


def test_the_printed_commands_can_be_pasted_for_a_folder_with_spaces(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my set").mkdir()
    EXPORTS["yolo_seg"](tmp_path / "my set")
    assert main(["init", "my set"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["  m2f shard 'my set.yaml'", "  m2f train 'my set.yaml'"]
    first_line = (tmp_path / "my set.yaml").read_text().splitlines()[0]
    assert first_line == "# m2f shard 'my set.yaml' && m2f train 'my set.yaml'"


@pytest.mark.parametrize("name", ["yolo_seg", "label_maps"])
def test_dark_images_with_16_bits_are_counted(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    EXPORTS[name](tmp_path / "set")
    for path in (tmp_path / "set/images").rglob("*.png"):
        cv2.imwrite(str(path), cv2.imread(str(path)).astype("uint16") * 16)
    assert main(["init", "set"]) == 0
    assert f"6 {DARK_IMAGE}" in capsys.readouterr().out.splitlines()


def test_unsupported_folder_is_rejected_with_one_message(tmp_path, capsys):
    assert main(["init", str(tmp_path), "--output", str(tmp_path / "a.yaml")]) == 2
    assert "docs/own_data.md" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train/_annotations.coco.json", "train"),
        ("annotations/instances_val2017.json", "val"),
        ("valid", "val"),
        ("training", "train"),
        ("test", "test"),
        ("trainer/strains.json", None),
    ],
)
def test_split_is_detected_from_names(path, split):
    assert split_from_path(path) == split


@pytest.mark.parametrize(
    ("machine", "crop", "micro"), [(Machine(0, 0), 256, 2), (Machine(1, 24), 1024, 2), (Machine(2, 80), 1024, 8)]
)
def test_choices_depend_on_machine_and_data(machine, crop, micro):
    found = Survey(
        num_images=100,
        num_read=100,
        class_counts=(("a", 9),),
        long_side=2000,
        max_objects_per_image=110,
        median_object_share=0.0001,
        largest_megapixels=4,
        num_crowds=0,
        faults=(),
    )
    choices = choose_settings(found, 100, machine)
    assert (choices.crop.value, choices.micro_batch.value, choices.queries.value) == (crop, micro, 200)
    assert choices.global_batch == micro * max(1, machine.num_gpus)


def test_each_data_set_is_opened_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    EXPORTS["roboflow"](tmp_path / "set")
    opened = []
    monkeypatch.setattr(
        "m2f.cluster.own_data.init.open_dataset", lambda d: (opened.append(d.shards), open_dataset(d))[1]
    )
    assert main(["init", "set"]) == 0
    assert opened == ["data/set/train", "data/set/val"]


def test_fault_kind_ignores_names_and_numbers():
    assert fault_kind("/d 1/im 9 .jpg: it has no map (/d 1/m 2/im 9 .png)") == "it has no map"
    assert fault_kind("/a/b.txt: line 3 has class 9") == fault_kind("/a/c.txt: line 14 has class 12")


@pytest.mark.parametrize(
    ("splits", "train", "val"),
    [
        (("train", "val", "test"), ["train"], ["val"]),
        (("train", "test"), ["train"], ["train"]),
        (("val", "test"), ["val"], ["val"]),
        ((None, "test"), [None], [None]),
        (("test",), ["test"], ["test"]),
    ],
)
def test_test_set_is_used_for_training_only_if_nothing_else_exists(splits, train, val):
    sets = tuple(SourceSet(split, SyntheticSource(num_images=4, seed=i)) for i, split in enumerate(splits))
    built = build_datasets(DataFormat("synthetic", "", sets), InitOptions(name="set", output=Path("set.yaml")))
    seeds = {part: [d.source.seed for name, d in built.items() if name.startswith(part)] for part in ("train", "val")}
    assert [splits[seed] for seed in seeds["train"]] == train
    assert [splits[seed] for seed in seeds["val"]] == val
