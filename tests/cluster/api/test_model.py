"""Tests of `m2f.load` and `Model.predict`: equality with `m2f predict`, image types, and error messages."""

from __future__ import annotations

import io
import json
import shutil
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import m2f
from m2f.cluster.api.result import make_result
from m2f.cluster.api.thresholds import ClassThreshold, Thresholds
from m2f.cluster.cli import main
from m2f.cluster.predict import trained_model
from m2f.data_pipeline.image_file import decode_id_png, decode_index_png
from m2f.eval.report.coco_files import describe_categories
from m2f.model.export.graphs import export_hugging_face
from m2f.model.mask2former import build_model
from m2f.model.structures import PanopticResult, PanopticSegment, SemanticResult
from m2f.model.weights.names import to_official_names
from tests.cluster.painted_scenes import write_painted_scenes
from tests.cluster.predict.test_export_verb import CONFIG, RECIPE
from tests.cluster.predict.test_predict import CLASSES, PAINTED


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_painted_scenes(folder, 5)
    return folder


@pytest.fixture
def painted_model():
    return m2f.Model(PAINTED)


def image_of(scenes, name="12"):
    return scenes / "images" / f"{name}.png"


# Equality with `m2f predict`


@pytest.fixture(scope="module")
def verb_output(scenes, tmp_path_factory):
    """Run `m2f predict` for every task. Return the folder whose subfolders, named by task, hold the outputs."""
    patch = pytest.MonkeyPatch()
    patch.setattr(trained_model, "open_trained", lambda *_: PAINTED)
    output = tmp_path_factory.mktemp("verb")
    with patch.context():
        for task in ("panoptic", "instance", "semantic"):
            words = ["predict", "model", str(scenes / "images"), "--output", str(output / task), "--task", task]
            assert main(words) == 0
    patch.undo()
    return output


def test_segments_equal_those_of_m2f_predict(painted_model, scenes, verb_output):
    document = json.loads((verb_output / "panoptic/panoptic.json").read_text())
    results = painted_model.predict(scenes / "images")
    assert len(results) == len(document["annotations"]) == 5
    for number, (result, annotation) in enumerate(zip(results, document["annotations"], strict=True), start=1):
        name = annotation["file_name"]
        entry, png = result.to_coco_panoptic(number, name)
        assert entry == annotation
        assert png == (verb_output / "panoptic/panoptic" / name).read_bytes()
        assert (decode_id_png(png) == result.panoptic).all()
        for position, mask in enumerate(result.masks):
            assert (mask == (result.panoptic == position + 1)).all()
            assert (result.semantic[mask] == result.labels[position]).all()
        assert ((result.semantic == -1) == (result.panoptic == 0)).all()


def test_detections_equal_those_of_m2f_predict(painted_model, scenes, verb_output):
    stored = json.loads((verb_output / "instance/instances.json").read_text())
    boxes = json.loads((verb_output / "instance/boxes.json").read_text())
    results = painted_model.predict([scenes / "images"], task="instance")
    found = [entry for number, result in enumerate(results, start=1) for entry in result.to_coco(number)]
    assert json.loads(json.dumps(found)) == stored
    api_boxes = np.concatenate([result.boxes for result in results])
    verb_boxes = np.array([box["bbox"] for box in boxes])
    assert (api_boxes[:, :2] == verb_boxes[:, :2]).all()
    assert (api_boxes[:, 2:] - api_boxes[:, :2] == verb_boxes[:, 2:]).all()
    with pytest.raises(m2f.UserError, match="its task is instance"):
        _ = results[0].semantic
    with pytest.raises(m2f.UserError, match="task='panoptic'"):
        _ = results[0].panoptic


def test_label_maps_equal_those_of_m2f_predict(painted_model, scenes, verb_output):
    for result in painted_model.predict(str(scenes / "images/*.png"), task="semantic"):
        stored = decode_index_png((verb_output / "semantic/labels" / f"{result.source[-6:-4]}.png").read_bytes())
        ids = np.array([category.id for category in CLASSES])
        assert (ids[result.semantic] == stored).all()
        assert np.isnan(result.scores).all()
        assert result.class_names == [CLASSES[label].name for label in np.unique(result.semantic)]
        assert result.masks.sum() == result.semantic.size
        assert all("score" not in entry for entry in result.to_coco())


@pytest.mark.parametrize(("highest", "num_bytes"), [(126, 1), (127, 1), (128, 2), (40000, 8)])
def test_maps_are_stored_compactly_and_returned_in_their_dtype(highest, num_bytes):
    ids = torch.tensor([[-1, 0, 3], [3, 0, highest]])
    semantic = make_result(SemanticResult(ids), (), source="", size=(2, 3), read=lambda: np.zeros((2, 3, 3)))
    assert semantic.semantic.dtype == semantic.labels.dtype == np.int64
    assert (semantic.semantic == ids.numpy()).all()
    assert semantic.labels.tolist() == [0, 3, highest]
    assert semantic.masks.sum() == 5
    segments = tuple(PanopticSegment(id=i, label=5, is_thing=True, score=0.5, area=1) for i in (3, highest))
    ids = ids.clamp(min=0).int()
    panoptic = make_result(PanopticResult(ids, segments), (), source="", size=(2, 3), read=semantic._read)
    assert panoptic.panoptic.dtype == np.int32
    assert (panoptic.panoptic == ids.numpy()).all()
    assert panoptic.masks.sum(axis=(1, 2)).tolist() == [2, 1]
    assert semantic._prediction.label_map.element_size() == num_bytes
    assert panoptic._prediction.segment_map.element_size() == num_bytes


def test_to_coco_is_accepted_by_pycocotools(painted_model, scenes):
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 7, "height": 64, "width": 96}],
        "annotations": [],
        "categories": describe_categories(CLASSES),
    }
    truth.createIndex()
    result = painted_model.predict(image_of(scenes))
    loaded = truth.loadRes(result.to_coco(7))
    assert len(loaded.getAnnIds()) == len(result) == len(result.masks)
    assert json.loads(json.dumps(result.to_coco(np.int64(7)))) == result.to_coco(7)
    assert json.dumps(result.to_coco_panoptic(np.int64(7))[0]) == json.dumps(result.to_coco_panoptic(7)[0])
    assert [painted_model.category_ids[label] for label in result.labels] == [
        e["category_id"] for e in result.to_coco(7)
    ]


# Image types


def test_all_image_types_give_the_same_prediction(painted_model, scenes):
    path = image_of(scenes)
    expected = painted_model.predict(path)
    rgb = np.asarray(Image.open(path))
    chw = torch.from_numpy(rgb.copy()).permute(2, 0, 1)
    for image in (str(path), Image.open(path), rgb, chw, chw / 255):
        found = painted_model.predict(image)
        assert (found.panoptic == expected.panoptic).all()
        assert (found.image == rgb).all()
    assert (painted_model.predict(cv2.imread(str(path)), channels="bgr").panoptic == expected.panoptic).all()
    mixed = painted_model.predict([rgb, path, chw], batch=2)
    assert [result.source for result in mixed] == ["image 0", str(path), "image 2"]
    assert all((result.panoptic == expected.panoptic).all() for result in mixed)
    assert painted_model.predict([]) == []


def test_the_image_of_a_result_does_not_change_with_the_buffer_of_the_caller(painted_model, scenes):
    frame = np.array(Image.open(image_of(scenes)))
    expected, tensor = frame.copy(), torch.from_numpy(frame).permute(2, 0, 1)
    results = [painted_model.predict(frame), painted_model.predict(tensor), painted_model.predict(frame[..., 0])]
    frame[:] = 0
    assert all((result.image == expected).all() for result in results[:2])
    assert (results[2].image == expected[..., :1]).all()


def test_drawing_on_the_image_of_a_result_does_not_change_its_overlay(painted_model, scenes):
    result = painted_model.predict(np.array(Image.open(image_of(scenes))))
    before = result.overlay().tobytes()
    result.image[:] = 0
    assert result.overlay().tobytes() == before
    assert result.image.any()


def test_exif_orientation_is_applied(painted_model, scenes, tmp_path):
    rotated = Image.open(image_of(scenes))
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "turned.png", exif=exif)
    from_file = painted_model.predict(tmp_path / "turned.png")
    from_pil = painted_model.predict(Image.open(tmp_path / "turned.png"))
    assert from_file.size == from_pil.size == (96, 64)
    assert (from_file.image == from_pil.image).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5, 3)), r"image 0 is an array float64 \[4, 5, 3\]; it must be uint8"),
        (np.zeros((2, 4, 5, 3), np.uint8), r"give list\(images\)"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"it must be \[3, H, W\]"),
        (torch.full((3, 4, 5), 2.0), "floats from 2 to 2"),
        (torch.full((3, 4, 5), torch.nan), "not normalised"),
        (Image.new("F", (4, 5)), "mode F.*scale it to 8 bits yourself, because convert"),
        (Image.new("I", (4, 5)), "mode I.*scale it to 8 bits yourself, because convert"),
        (Image.new("LAB", (4, 5)), "mode LAB.*convert it to RGB"),
        (Image.new("RGB", (0, 5)), "image 0 has no pixels: its size is 0 x 5"),
        ([3], "image 0 is a int"),
        (5, "image 0 is a int"),
        (None, "image 0 is a NoneType .OpenCV's imread returns it for a file that it cannot read"),
        ("iVBORw0KGgo" * 1000, r"^(iVBORw0KGgo){27}iVB\.\.\.: no such image"),
        ("nowhere.jpg", "nowhere.jpg: no such image"),
    ],
)
def test_invalid_images_are_rejected_with_their_name(painted_model, image, message):
    with pytest.raises(m2f.UserError, match=message):
        painted_model.predict(image)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_pil_images_with_16_bits_give_the_pixels_of_their_file(painted_model, tmp_path, mode):
    values = np.linspace(0, 65535, 64 * 96).astype("<u2" if mode != "I;16B" else ">u2").reshape(64, 96)
    image = Image.frombytes(mode, (96, 64), values.tobytes())
    cv2.imwrite(str(tmp_path / "grey.png"), values.astype(np.uint16))
    from_file = painted_model.predict(tmp_path / "grey.png")
    assert (painted_model.predict(image).image == from_file.image).all()
    assert len(np.unique(from_file.image)) == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "depth"}, "task is 'depth'; it must be one of panoptic, instance, semantic"),
        ({"min_score": 2}, "min_score is 2"),
        ({"batch": 0}, "batch is 0"),
        ({"channels": "hsv"}, "channels is 'hsv'"),
    ],
)
def test_invalid_options_are_rejected_with_their_name(painted_model, options, message):
    with pytest.raises(m2f.UserError, match=message):
        painted_model.predict(np.zeros((4, 5, 3), np.uint8), **options)


def test_broken_image_file_is_named(painted_model, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(m2f.UserError, match=r"broken\.jpg"):
        painted_model.predict(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "closed"])
def test_broken_pil_image_is_named_by_its_position(painted_model, kind):
    file = io.BytesIO()
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(file, "PNG" if kind == "closed" else kind)
    image = Image.open(io.BytesIO(file.getvalue() if kind == "closed" else file.getvalue()[:-30]))
    if kind == "closed":
        image.close()
    with pytest.raises(m2f.UserError, match="image 0 is a PIL image whose pixels cannot be read"):
        painted_model.predict([image])


# Results


def test_the_overlay_has_the_size_of_the_image(painted_model, scenes):
    result = painted_model.predict(image_of(scenes), task="instance")
    picture, everything = result.overlay(), result.overlay(min_score=0.0)
    assert picture.size == everything.size == (96, 64)
    assert picture.tobytes() != everything.tobytes()
    assert result._repr_png_().startswith(b"\x89PNG")


def test_min_score_filters_detections(painted_model, scenes):
    everything = painted_model.predict(image_of(scenes), task="instance")
    few = painted_model.predict(image_of(scenes), task="instance", min_score=0.6)
    assert 0 < len(few) < len(everything)
    assert few.scores.tolist() == [score for score in everything.scores if score >= 0.6]


def test_to_supervision_returns_detections_if_the_package_is_installed(painted_model, scenes, monkeypatch):
    result = painted_model.predict(image_of(scenes))
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(m2f.UserError, match="pip install supervision"):
        result.to_supervision()
    fake_supervision = SimpleNamespace(Detections=lambda **columns: columns)
    monkeypatch.setitem(sys.modules, "supervision", fake_supervision)
    found = result.to_supervision()
    assert list(found) == ["xyxy", "mask", "confidence", "class_id", "data"]
    assert found["data"]["class_name"].tolist() == result.class_names


def test_result_without_objects_is_valid(painted_model):
    empty_result = painted_model.predict(np.zeros((40, 50, 3), np.uint8), min_score=1.0)
    assert (len(empty_result), empty_result.masks.shape, empty_result.boxes.shape) == (0, (0, 40, 50), (0, 4))
    assert (empty_result.to_coco(), empty_result.class_names) == ([], [])
    assert not empty_result.panoptic.any()
    assert (empty_result.semantic == -1).all()
    assert empty_result.overlay().size == (50, 40)


# Loading


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    """Write a small model as an official checkpoint with its recipe and as a Hugging Face folder; return the parent."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = build_model(CONFIG).eval()
    export_hugging_face(model, CONFIG, folder / "theirs", ["person", "sky", "tree"], shortest_edge=64, max_size=96)
    torch.save({"model": to_official_names(model.state_dict())}, folder / "official.pth")
    recipe = RECIPE.format(folder=folder).replace("  num_classes: 3\n", "")
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def test_hugging_face_folder_and_official_file_give_the_same_predictions(model_files, scenes):
    exported = m2f.load(model_files / "theirs", device="cpu")
    official = m2f.load(model_files / "official.pth", recipe=model_files / "recipe.yaml")
    assert exported.names == ("person", "sky", "tree")
    assert official.names == ("class 0", "class 1", "class 2")
    first, second = (model.predict(image_of(scenes), task="instance") for model in (exported, official))
    assert first.scores.tolist() == second.scores.tolist()
    assert (first.masks == second.masks).all()


def test_registered_models_leave_out_detections_below_their_thresholds(model_files, scenes, tmp_path, monkeypatch):
    checkpoint = shutil.copytree(model_files / "theirs", tmp_path / "artifacts/checkpoint")
    monkeypatch.setattr("m2f.cluster.tracking.registered.model_folder", lambda address: checkpoint)
    without = m2f.load("models:/cells@champion").predict(image_of(scenes), task="instance")
    lowest = float(np.median(without.scores[without.labels == 0]))
    classes = {"person": ClassThreshold(threshold=lowest, precision=0.9, recall=0.5, detections=3)}
    classes["sky"] = ClassThreshold(threshold=None, precision=None, recall=0.0, detections=0)
    stored = Thresholds(precision=0.9, dataset="val", fingerprint="f", classes=classes)
    (tmp_path / "artifacts/thresholds.json").write_text(stored.to_json())
    model = m2f.load("models:/cells@champion")
    found = model.predict(image_of(scenes), task="instance")
    kept = np.where(without.labels == 0, without.scores >= lowest, without.labels == 2)
    assert 0 < np.count_nonzero(kept[without.labels == 0]) < np.count_nonzero(without.labels == 0)
    assert found.scores.tolist() == without.scores[kept].tolist()
    assert (found.masks == without.masks[kept]).all()
    everything = model.predict(image_of(scenes), task="instance", thresholds=False)
    assert everything.scores.tolist() == without.scores.tolist()
    assert len(m2f.load(checkpoint).predict(image_of(scenes), task="instance")) == len(without)


def test_load_applies_settings_to_the_recipe(model_files):
    settings = {"evaluation.shortest_edge": 32, "evaluation.test_time": {"kind": "whole"}}
    model = m2f.load(model_files / "official.pth", recipe=model_files / "recipe.yaml", settings=settings)
    assert model._trained.evaluation.shortest_edge == 32


def test_number_of_torch_threads_is_restored(model_files):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        m2f.load(model_files / "theirs").predict(np.zeros((40, 50, 3), np.uint8))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "official.pth"}, "give the recipe of its model"),
        ({"source": "nowhere"}, "nowhere"),
        ({"source": "x" * 300}, "no recipe is named 'x{300}'"),
        ({"source": "x" * 300 + "/model.pth"}, "is only a weight file"),
        ({"source": "x" * 300 + ".pth", "recipe": "recipe.yaml"}, "no such file or folder"),
        ({"source": "official.pth", "recipe": "x" * 300}, "no recipe is named 'x{300}'"),
        ({"source": "theirs", "device": "tpu:9"}, "device is 'tpu:9', which cannot be used here"),
        ({"source": "official.pth", "recipe": "x.yaml", "checkpoint": 3}, "checkpoint is 3, but recipe is also set"),
    ],
)
def test_load_errors_name_the_cause(model_files, monkeypatch, options, message):
    monkeypatch.chdir(model_files)
    with pytest.raises(m2f.UserError, match=message):
        m2f.load(**options)
