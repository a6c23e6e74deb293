"""Tests of prediction: minimum scores, batches, inputs, and submissions to benchmark servers."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from m2f.cluster.cli import main
from m2f.cluster.predict import predict as prediction
from m2f.cluster.predict import trained_model
from m2f.cluster.predict.benchmark_zip import check_submission
from m2f.cluster.predict.choose_checkpoint import ChosenWeights
from m2f.cluster.predict.inputs import find_images, match_image_list, number_images, read_image_list, read_images
from m2f.cluster.predict.predict import LoadedImage, Predictor, batches_by_shape
from m2f.cluster.predict.trained_model import TrainedModel, open_trained
from m2f.cluster.recipe.load import parse_recipe
from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import decode_id_png, decode_index_png
from m2f.data_pipeline.readers.ade20k_classes import CATEGORIES_150
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationConfig, SlidingWindows, WholeImage
from m2f.eval.inference.evaluator import Evaluator
from m2f.model.config import ModelConfig, PostprocessConfig
from m2f.model.errors import ConfigError
from m2f.model.mask2former import build_model
from m2f.model.structures import PanopticResult, SemanticResult
from tests.cluster.evaluation.test_evaluate import RECIPE
from tests.cluster.painted_scenes import CATEGORIES, SceneModel, write_painted_scenes

CLASSES = tuple(Category(c["id"], c["name"], bool(c["isthing"]), tuple(c["color"])) for c in CATEGORIES)
PAINTED = TrainedModel(
    model=SceneModel(),
    config=ModelConfig(postprocess=PostprocessConfig(object_threshold=0.3, overlap_threshold=0.3)),
    task="panoptic",
    classes=CLASSES,
    evaluation=EvaluationConfig(shortest_edge=64),
    weights="painted",
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_painted_scenes(folder, 5)
    return folder


@pytest.fixture
def painted(monkeypatch):
    """Make every verb open the painted model."""
    monkeypatch.setattr(trained_model, "open_trained", lambda *_: PAINTED)


def predict(scenes, output, *options):
    return main(["predict", "model", str(scenes / "images"), "--output", str(output), *map(str, options)])


def load(path):
    return json.loads(path.read_text())


# Scores


@pytest.mark.parametrize(("options", "precision"), [((), "fp32"), (("--precision", "bf16"), "bf16")])
def test_precision_comes_from_the_recipe_or_the_option(painted, scenes, tmp_path, monkeypatch, options, precision):
    precisions = []
    monkeypatch.setattr(prediction, "set_precision", lambda model, precision: precisions.append(precision))
    assert predict(scenes, tmp_path / "out", "--no-pictures", *options) == 0
    assert precisions == [precision]


def test_min_score_drops_segments_of_lower_scores(painted, scenes, tmp_path):
    assert predict(scenes, tmp_path / "all") == 0
    assert predict(scenes, tmp_path / "few", "--min-score", 0.75) == 0
    scores = [
        [s["score"] for a in load(tmp_path / name / "panoptic.json")["annotations"] for s in a["segments_info"]]
        for name in ("all", "few")
    ]
    assert len(scores[0]) > len(scores[1]) > 0
    assert min(scores[0]) < 0.75 <= min(scores[1])
    maps = [(tmp_path / name / "panoptic/12.png").read_bytes() for name in ("all", "few")]
    assert (decode_id_png(maps[1]) == 0).sum() > (decode_id_png(maps[0]) == 0).sum()
    pictures = [(tmp_path / name / "overlays/12.png").read_bytes() for name in ("all", "few")]
    assert pictures[0] != pictures[1]


def test_min_score_drops_detections_of_lower_scores(painted, scenes, tmp_path):
    assert predict(scenes, tmp_path / "all", "--task", "instance") == 0
    assert predict(scenes, tmp_path / "few", "--task", "instance", "--min-score", 0.6) == 0
    everything, few = (load(tmp_path / name / "instances.json") for name in ("all", "few"))
    assert few == [entry for entry in everything if entry["score"] >= 0.6]
    assert 0 < len(few) < len(everything)
    boxes = load(tmp_path / "few/boxes.json")
    assert [(b["image_id"], b["category_id"], b["score"]) for b in boxes] == [
        (e["image_id"], e["category_id"], e["score"]) for e in few
    ]
    assert all("bbox" not in entry for entry in few)


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_images_without_high_scoring_segments_are_counted(task, painted, scenes, tmp_path, capsys):
    assert predict(scenes, tmp_path / "all", "--task", task) == 0
    assert "scored high enough" not in capsys.readouterr().out
    assert predict(scenes, tmp_path / "none", "--task", task, "--min-score", 1) == 0
    assert "no segment scored high enough to be drawn in 5 images; use --min-score 0.1" in capsys.readouterr().out


def test_min_score_leaves_low_scoring_pixels_unlabelled(painted, scenes, tmp_path):
    assert predict(scenes, tmp_path / "all", "--task", "semantic") == 0
    assert predict(scenes, tmp_path / "few", "--task", "semantic", "--min-score", 0.75) == 0
    everything, few = (decode_index_png((tmp_path / n / "labels/12.png").read_bytes()) for n in ("all", "few"))
    labelled = few > 0
    assert 0.05 < labelled.mean() < 0.95
    assert (few[labelled] == everything[labelled]).all()
    assert set(np.unique(everything)) <= {category.id for category in CLASSES}


# Batches


def test_batches_hold_one_shape_and_change_results_by_rounding_only():
    recipe = RECIPE.replace("{folder}", "nowhere").replace("{classes}", "4").replace("{{", "{").replace("}}", "}")
    config = parse_recipe(recipe).model
    torch.manual_seed(0)
    model = build_model(config, pretrained_backbone=False).eval()
    settings = EvaluationConfig(shortest_edge=64, max_size=96)
    trained = replace(PAINTED, model=model, config=config, evaluation=settings)
    random = np.random.default_rng(0)
    sizes = [(60, 80), (80, 60), (62, 80), (60, 80), (40, 90), (60, 79), (81, 60)]
    pixels = [random.integers(0, 255, (*size, 3), dtype=np.uint8) for size in sizes]
    inputs = number_images([f"{i}.jpg" for i in range(len(sizes))])
    images = [LoadedImage(image, array) for image, array in zip(inputs, pixels, strict=True)]

    predictor = Predictor(trained, "instance")
    batches = list(batches_by_shape(images, predictor, 3))
    assert [[one.image.id for one in batch] for batch in batches] == [[1, 3, 4], [2, 7], [5, 6]]
    together = {one.image.id: result for b in batches for one, result in zip(b, predictor.predict(b), strict=True)}
    for one in images:
        (alone,) = predictor.predict([one])
        assert alone.scores == pytest.approx(together[one.image.id].scores, abs=1e-4)


@pytest.mark.parametrize("test_time", [WholeImage(), SlidingWindows(size=64, stride=32)])
def test_several_tasks_are_predicted_with_one_forward_pass(test_time):
    recipe = RECIPE.replace("{folder}", "nowhere").replace("{classes}", "4").replace("{{", "{").replace("}}", "}")
    config = parse_recipe(recipe).model
    torch.manual_seed(0)
    model, calls = build_model(config, pretrained_backbone=False).eval(), []
    model.register_forward_hook(lambda *words: calls.append(1))
    settings = EvaluationConfig(shortest_edge=64, max_size=96, test_time=test_time)
    trained = replace(PAINTED, model=model, config=config, evaluation=settings)
    (image,) = number_images(["a.jpg"])
    loaded = LoadedImage(image, np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8))
    alone = {}
    for task in ("panoptic", "instance", "semantic"):
        calls.clear()
        (alone[task],) = Predictor(trained, task).predict([loaded])
    calls_for_one_task = len(calls)
    calls.clear()
    (found,) = Predictor(trained, "panoptic").predict_tasks([loaded], tuple(alone))
    assert len(calls) == calls_for_one_task
    assert list(found) == list(alone)
    assert torch.equal(found["panoptic"].segment_map, alone["panoptic"].segment_map)
    assert found["panoptic"].segments == alone["panoptic"].segments
    assert (found["instance"].scores == alone["instance"].scores).all()
    assert torch.equal(found["semantic"].label_map, alone["semantic"].label_map)


def test_whole_images_are_padded_to_squares_on_request():
    seen = []

    class Model(SceneModel):
        def forward(self, images):
            seen.append(images.shape[-2:])
            return super().forward(images)

    evaluation = EvaluationConfig(shortest_edge=64, max_size=96, test_time=WholeImage(square=True))
    predictor = Predictor(replace(PAINTED, model=Model(), evaluation=evaluation), "panoptic")
    (image,) = number_images(["a.jpg"])
    loaded = LoadedImage(image, np.zeros((40, 60, 3), np.uint8))
    (found,) = predictor.predict([loaded])
    assert seen == [predictor.input_size(loaded.pixels)] == [(96, 96)]
    assert found.segment_map.shape == (40, 60)


def test_convolutions_use_the_same_settings_as_in_evaluation():
    """Deterministic algorithms without TF32, so that results do not depend on the GPU."""
    seen = []

    class Model(SceneModel):
        def forward(self, images):
            flags = torch.backends.cudnn
            seen.append((flags.allow_tf32, flags.deterministic, flags.benchmark))
            return super().forward(images)

    trained = replace(PAINTED, model=Model())
    (image,) = number_images(["a.jpg"])
    pixels = np.zeros((64, 96, 3), np.uint8)
    list(Predictor(trained, "panoptic").predict([LoadedImage(image, pixels)]))
    settings = EvaluationConfig(tasks=("panoptic",))
    evaluator = Evaluator(
        trained.model, CategoryTable(CLASSES), settings, model_task="panoptic", postprocess=PostprocessConfig()
    )
    evaluator._forward(torch.zeros(1, 3, 64, 96), torch.tensor([[64, 96]]))
    assert seen == 2 * [(False, True, False)]


def test_incomplete_batches_are_run_when_too_many_images_wait():
    (image,) = number_images(["a.png"])
    num_waiting = max_waiting = 0

    def counted_images():
        nonlocal num_waiting, max_waiting
        for i in range(20):
            num_waiting += 1
            max_waiting = max(max_waiting, num_waiting)
            yield LoadedImage(image, np.zeros((64, 64 + 32 * i, 3), np.uint8))

    for batch in batches_by_shape(counted_images(), Predictor(PAINTED, "panoptic"), 2):
        num_waiting -= len(batch)
    assert (num_waiting, max_waiting) == (0, 8)


# Inputs


@pytest.fixture
def photos(scenes, bucket):
    """Upload the scenes and a text file to a bucket, and return the URL of the folder."""
    storage, url = Storage(), f"{bucket}/photos"
    for path in (scenes / "images").iterdir():
        storage.put_file(f"{url}/{path.name}", path)
    storage.put_file(f"{url}/deep/10.PNG", scenes / "images/10.png")
    storage.put(f"{url}/notes.txt", b"no image")
    return url


def file_names(urls):
    return [url.rpartition("/")[2] for url in urls]


def test_files_folders_and_patterns_give_each_image_once(scenes):
    folder, storage = str(scenes / "images"), Storage()
    assert file_names(find_images([folder, f"{folder}/10.png"], storage)) == [f"{i}.png" for i in range(10, 15)]
    assert file_names(find_images([f"{folder}/1[13].*"], storage)) == ["11.png", "13.png"]
    assert len(find_images([f"{scenes}/**/10.png"], storage)) == 3
    with pytest.raises(DataError, match=r"nothing\.jpg: no such image"):
        find_images([folder, "nothing.jpg"], storage)
    with pytest.raises(DataError, match="no JPEG, PNG, TIFF, BMP or WebP file in the folder"):
        find_images([f"{scenes}/*.json"], storage)


def test_images_in_linked_folders_are_found_once(scenes, tmp_path):
    (tmp_path / "linked").symlink_to(scenes / "images")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert file_names(find_images([str(tmp_path)], Storage())) == [f"{i}.png" for i in range(10, 15)]


def test_patterns_match_in_s3_as_on_disk(photos):
    storage = Storage()
    assert file_names(find_images([photos], storage)) == ["10.png", "11.png", "12.png", "13.png", "14.png", "10.PNG"]
    assert file_names(find_images([f"{photos}/1?.png"], storage)) == [f"{i}.png" for i in range(10, 15)]
    assert file_names(find_images([f"{photos}/**/*.PNG"], storage)) == ["10.PNG"]
    assert len(find_images([f"{photos}/**/*.*"], storage)) == 6  # `**` also matches no folder
    assert file_names(find_images([f"{photos}/12.png"], storage)) == ["12.png"]
    with pytest.raises(DataError, match=r"s3://box/photos/15\.png: no such image"):
        find_images([f"{photos}/15.png"], storage)
    images = number_images(find_images([photos], storage))
    assert [image.name for image in images] == ["10", "11", "12", "13", "14", "10-2"]
    assert [pixels.shape for _, pixels in read_images(images, storage)] == [(64, 96, 3)] * 6


def test_images_in_s3_are_predicted(painted, photos, tmp_path):
    assert main(["predict", "model", photos, "--output", str(tmp_path), "--batch", "4", "--no-pictures"]) == 0
    assert len(load(tmp_path / "panoptic.json")["annotations"]) == 6
    assert not (tmp_path / "overlays").exists()


@pytest.mark.parametrize("output", ["seen", "."])
def test_pictures_of_earlier_predictions_are_not_predicted(painted, scenes, tmp_path, capsys, output):
    photos = shutil.copytree(scenes / "images", tmp_path / "photos")
    folder = photos / output
    words = ["predict", "model", str(photos), "--output", str(folder), "--task", "semantic"]
    assert main(words) == 0
    first = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert main(words) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == first
    assert "left out 10 pictures that an earlier prediction wrote" in capsys.readouterr().err
    assert main([*words, str(folder / "labels"), str(folder / "overlays/10.png")]) == 0
    words[2] = str(folder / "labels")
    assert main(words) == 2
    assert "all images are pictures that were predicted into" in capsys.readouterr().err


def test_a_run_in_s3_is_opened(bucket, monkeypatch):
    opened = []
    monkeypatch.setattr(trained_model, "_open_run", lambda config, weights, _: opened.append((config, weights)))
    checkpoint = "s3://box/runs/moved/checkpoints/step_00000001"
    Storage().put("s3://box/runs/moved/recipe.yaml", RECIPE.format(folder="/elsewhere", classes=4).encode())
    Storage().put(f"{checkpoint}/recipe.yaml", RECIPE.format(folder="/x", classes=4).encode())
    Storage().put(f"{checkpoint}/manifest.json", b"{}")
    open_trained("s3://box/runs/moved/", ["seed=7"], None)
    open_trained(checkpoint, [], None)
    (of_run, of_checkpoint), weights = zip(*opened, strict=True)
    assert (of_run.run_folder, of_run.seed) == ("s3://box/runs/moved", 7)
    assert of_run.datasets == of_checkpoint.datasets
    assert weights == (ChosenWeights(checkpoint, 1), ChosenWeights(checkpoint, None))
    with pytest.raises(ConfigError, match="s3://box/runs/other has neither"):
        open_trained("s3://box/runs/other", [], None)


def test_image_list_sets_ids_and_omits_unlisted_images(scenes, tmp_path):
    urls = find_images([str(scenes / "images")], Storage())
    listed = [{"id": 900 + i, "file_name": f"{i}.png", "height": 64, "width": 96} for i in (13, 11)]
    (tmp_path / "list.json").write_text(json.dumps({"images": listed}))
    images = match_image_list(urls, read_image_list(tmp_path / "list.json"))
    assert [(image.id, image.name) for image in images] == [(913, "13"), (911, "11")]
    with pytest.raises(DataError, match=r"1 of 2 images in .* are not among the given images, such as 13\.png"):
        match_image_list(urls[:2], read_image_list(tmp_path / "list.json"))
    wrong = [replace(images[0], size=(60, 90))]
    ((_, problem),) = read_images(wrong, Storage())
    assert "96 x 64 pixels, but its annotation is 90 x 60" in str(problem)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="not a COCO image list"):
        read_image_list(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--min-score", "1.5"], "--min-score is 1.5"),
        (["--image-info", "nowhere.json"], "nowhere.json: the image list cannot be read: No such file"),
        (["--submission", "coco"], "the COCO servers need the ids of their images"),
        (["--submission", "ade20k"], "accepts label maps, not panoptic results; give --task semantic"),
        (["--submission", "ade20k", "--task", "semantic"], "the model has 4 classes with ids from 3 to 200"),
        (["--submission", "coco", "--task", "semantic"], "the COCO servers accept panoptic results and masks"),
        (["--submission", "coco", "--algorithm", "a/b"], "--algorithm is 'a/b'"),
    ],
)
def test_predict_errors_print_one_message(painted, scenes, tmp_path, capsys, options, expected):
    assert predict(scenes, tmp_path / "out", *options) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Submissions


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_coco_submission_has_the_required_names_and_can_be_scored(painted, scenes, tmp_path, task):
    truth = scenes / ("panoptic.json" if task == "panoptic" else "instances.json")
    content = load(truth)
    prefix = "panoptic_" if task == "panoptic" else ""
    info = tmp_path / f"{prefix}image_info_test-dev2017.json"
    info.write_text(json.dumps({"images": content["images"], "categories": content["categories"]}))
    out = tmp_path / "out"
    options = ["--task", task, "--submission", "coco", "--image-info", info, "--algorithm", "m2f", "--no-pictures"]
    assert predict(scenes, out, *options) == 0
    kind = "panoptic" if task == "panoptic" else "detections"
    name = f"{kind}_test-dev2017_m2f_results"
    with zipfile.ZipFile(out / f"{name}.zip") as archive:
        members = archive.namelist()
        archive.extractall(tmp_path / "zip")
    maps = [f"{name}/{i}.png" for i in range(10, 15)] if task == "panoptic" else []
    assert members == [f"{name}.json", *maps]
    words = ["score", "panoptic" if task == "panoptic" else "instances", "--truth", truth, "--workers", "1"]
    words += ["--predictions", tmp_path / "zip" / f"{name}.json"]
    if task == "panoptic":
        words += ["--truth-masks", scenes / "panoptic", "--prediction-masks", tmp_path / "zip" / name]
    assert main([*map(str, words), "--output", str(tmp_path / "score.json")]) == 0
    score = load(tmp_path / "score.json")
    assert (score["all"]["pq"] if task == "panoptic" else score["AP"]) > 0.05


def test_ade20k_submission_contains_one_label_map_per_image(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(trained_model, "open_trained", lambda *_: replace(PAINTED, classes=CATEGORIES_150.categories))
    assert predict(scenes, tmp_path, "--task", "semantic", "--submission", "ade20k") == 0
    with zipfile.ZipFile(tmp_path / "ade20k_mask2former.zip") as archive:
        assert archive.namelist() == [f"{i}.png" for i in range(10, 15)]
        labels = decode_index_png(archive.read("11.png"))
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) <= {1, 2, 3, 4}


@pytest.mark.parametrize("server", ["coco", "ade20k"])
def test_submission_leaves_out_images_of_earlier_predictions(scenes, tmp_path, monkeypatch, server):
    classes = CLASSES if server == "coco" else CATEGORIES_150.categories
    monkeypatch.setattr(trained_model, "open_trained", lambda *_: replace(PAINTED, classes=classes))
    content = load(scenes / "panoptic.json")
    images = [image for image in content["images"] if image["file_name"] == "12.png"]
    info = tmp_path / "image_info_x.json"
    info.write_text(json.dumps({"images": images, "categories": content["categories"]}))
    out, options = tmp_path / "out", ["--task", "panoptic" if server == "coco" else "semantic", "--no-pictures"]
    assert predict(scenes, out, *options) == 0
    assert predict(scenes, out, *options, "--image-info", info, "--submission", server) == 0
    (path,) = out.glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        members = [name.rpartition("/")[2] for name in archive.namelist()]
    assert [name for name in members if name.endswith(".png")] == ["12.png"]


def test_submission_with_different_categories_is_rejected(tmp_path):
    info = tmp_path / "image_info_test-dev2017.json"
    info.write_text(json.dumps({"images": [], "categories": [{"id": 11, "name": "boat"}]}))
    with pytest.raises(ConfigError, match=r"3 categories of .*, such as 3 \(sea\), do not match .*panoptic_image_info"):
        check_submission("coco", "panoptic", CLASSES, read_image_list(info), "m2f")


def test_no_submission_is_written_with_missing_images(painted, scenes, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.jpg").write_bytes(b"broken")
    cv2.imwrite(str(tmp_path / "in/2.png"), np.zeros((64, 96, 3), np.uint8))
    listed = [{"id": i, "file_name": name, "height": 64, "width": 96} for i, name in ((1, "1.jpg"), (2, "2.png"))]
    document = {"images": listed, "categories": list(CATEGORIES)}
    (tmp_path / "in/image_info_x.json").write_text(json.dumps(document))
    words = ["predict", "model", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--submission", "coco"]
    assert main([*words, "--image-info", str(tmp_path / "in/image_info_x.json")]) == 1
    assert "no submission was written: it would lack 1 image" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.zip"))


def test_copies_of_all_tasks_start_before_the_first_is_awaited(monkeypatch):
    events = []

    class Copy:
        def __init__(self, result):
            self.result = result
            events.append("start")

        def wait(self):
            events.append("wait")
            return self.result

    monkeypatch.setattr(prediction, "ResultCopy", Copy)
    segments, labels = PanopticResult(torch.ones(2, 3), ()), SemanticResult(torch.zeros(2, 3))
    found = prediction._on_host([("panoptic", segments), ("semantic", labels)])
    assert found["panoptic"].segment_map is segments.segment_map
    assert found["semantic"].label_map is labels.label_map
    assert events == ["start", "start", "wait", "wait"]
