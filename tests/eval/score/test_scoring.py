"""Scoring of result files, compared with slow implementations of the reference tools and with pycocotools."""

import contextlib
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from m2f.eval.errors import EvaluationError
from m2f.eval.score import parallel
from m2f.eval.score.cityscapes import cityscapes_instance_scoring, cityscapes_semantic_scoring
from m2f.eval.score.instances import instance_scoring
from m2f.eval.score.panoptic import PanopticFiles, panoptic_scoring
from m2f.eval.score.semantic import label_maps, semantic_scoring
from m2f.model.errors import UserError

STATS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
CATEGORIES = [
    {"id": 3, "name": "car", "isthing": 1},
    {"id": 7, "name": "road", "isthing": 0},
    {"id": 200, "name": "cat", "isthing": 1},
    {"id": 5, "name": "sky", "isthing": 0},
    {"id": 9, "name": "never", "isthing": 0},
]


def run(scoring, workers=1):
    return scoring.run(workers, lambda count: None)


def shapes(rng, size=(60, 80), count=9):
    """Return an id map of rectangles over void, with ids of up to 24 bits."""
    id_map = np.zeros(size, np.int64)
    for i in rng.choice(2**24 - 1, count, replace=False) + 1:
        y, x = rng.integers(0, size[0] - 10), rng.integers(0, size[1] - 10)
        h, w = rng.integers(5, 40, 2)
        id_map[y : y + h, x : x + w] = i
    return id_map


def write_ids(path, id_map):
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = np.stack([id_map & 255, id_map >> 8 & 255, id_map >> 16], axis=-1).astype(np.uint8)
    Image.fromarray(rgb).save(path)


def panoptic_set(folder, seed=0, num_images=10):
    """Write images with crowds, void, unlisted truth ids, inexact areas and wrong classes; image ids are strings."""
    rng = np.random.default_rng(seed)
    ids = [c["id"] for c in CATEGORIES[:4]]
    truth, predictions = [], []
    for n in range(num_images):
        t_map = shapes(rng)
        p_map = np.roll(t_map, rng.integers(-3, 4, 2), axis=(0, 1))
        p_map[rng.random(p_map.shape) < 0.02] = 0
        p_map[p_map > 0] += 1
        category = {int(i): int(rng.choice(ids)) for i in np.unique(t_map[t_map > 0])}
        segments = [
            {"id": i, "category_id": k, "iscrowd": int(rng.random() < 0.3)}
            | {"area": int((t_map == i).sum()) + int(rng.integers(0, 3))}
            for i, k in category.items()
            if rng.random() < 0.9
        ]
        found = [
            {"id": i, "category_id": category[i - 1] if rng.random() < 0.8 else int(rng.choice(ids))}
            for i in np.unique(p_map[p_map > 0]).tolist()
        ]
        name = f"{n}.png"
        write_ids(folder / "truth" / name, t_map)
        write_ids(folder / "found" / name, p_map)
        rng.shuffle(segments)
        truth.append({"image_id": f"city_{n}", "file_name": name, "segments_info": segments})
        predictions.append({"image_id": f"city_{n}", "file_name": name, "segments_info": found})
    (folder / "truth.json").write_text(json.dumps({"annotations": truth, "categories": CATEGORIES}))
    (folder / "found.json").write_text(json.dumps({"annotations": predictions[::-1]}))
    return PanopticFiles(
        truth=folder / "truth.json",
        truth_masks=folder / "truth",
        predictions=folder / "found.json",
        prediction_masks=folder / "found",
    )


def slow_panoptic(files):
    """Return the sum of IoU and the counts of every category by panopticapi's rules, computed one mask at a time."""

    def load(folder, annotation):
        rgb = np.array(Image.open(folder / annotation["file_name"]), dtype=np.int64)
        return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]

    content = json.loads(files.truth.read_text())
    predictions = {a["image_id"]: a for a in json.loads(files.predictions.read_text())["annotations"]}
    table = {c["id"]: {"iou": 0.0, "tp": 0, "fp": 0, "fn": 0} for c in content["categories"]}
    for annotation in content["annotations"]:
        prediction = predictions[annotation["image_id"]]
        t_map, p_map = load(files.truth_masks, annotation), load(files.prediction_masks, prediction)
        segments = {s["id"]: s for s in annotation["segments_info"]}
        found = {s["id"]: s["category_id"] for s in prediction["segments_info"]}
        matched = []
        for t in sorted(segments):
            for p in sorted(found):
                shared = ((t_map == t) & (p_map == p)).sum()
                if not shared or segments[t]["iscrowd"] or segments[t]["category_id"] != found[p]:
                    continue
                union = (p_map == p).sum() + segments[t]["area"] - shared - ((t_map == 0) & (p_map == p)).sum()
                if shared / union > 0.5:
                    matched.append((t, p))
                    table[found[p]]["tp"] += 1
                    table[found[p]]["iou"] += shared / union
        crowds = {}
        for t, s in segments.items():
            if s["iscrowd"]:
                crowds[s["category_id"]] = t
            elif t not in [m[0] for m in matched]:
                table[s["category_id"]]["fn"] += 1
        for p, k in found.items():
            if p not in [m[1] for m in matched]:
                ignored = (p_map == p) & ((t_map == 0) | (t_map == crowds.get(k, 0)))
                if ignored.sum() / (p_map == p).sum() <= 0.5:
                    table[k]["fp"] += 1
    return table


@pytest.mark.parametrize("seed", range(3))
def test_panoptic_files_score_as_the_rules_of_panopticapi(seed, tmp_path):
    files = panoptic_set(tmp_path, seed)
    content = run(panoptic_scoring(files, boundary=False)).content
    expected = slow_panoptic(files)
    assert sum(row["tp"] for row in expected.values()) > 10 < sum(row["fp"] for row in expected.values())
    pq = {}
    for category, row in expected.items():
        assert {key: content["per_class"][str(category)][key] for key in ("tp", "fp", "fn")} == {
            key: row[key] for key in ("tp", "fp", "fn")
        }
        assert content["per_class"][str(category)]["iou"] == pytest.approx(row["iou"], abs=1e-12)
        if size := row["tp"] + (row["fp"] + row["fn"]) / 2:
            pq[category] = row["iou"] / size
    assert content["all"]["pq"] == pytest.approx(np.mean(list(pq.values())), abs=1e-12)
    assert content["things"]["pq"] == pytest.approx((pq[3] + pq[200]) / 2, abs=1e-12)
    assert content["stuff"]["n"] == len(pq) - 2 == 2  # `never` has no segments
    assert content["per_class"]["9"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "iou": 0.0, "tp": 0, "fp": 0, "fn": 0}


def test_results_are_bit_identical_with_several_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "START_SECONDS", 0.0)
    files = panoptic_set(tmp_path, num_images=40)
    assert run(panoptic_scoring(files, boundary=True), workers=2) == run(panoptic_scoring(files, boundary=True))


def test_split_without_classes_is_null_and_boundary_pq_is_lower(tmp_path):
    files = panoptic_set(tmp_path, num_images=10)
    document = json.loads(files.truth.read_text())
    for category in document["categories"]:
        category["isthing"] = 1
    files.truth.write_text(json.dumps(document))
    plain = run(panoptic_scoring(files, boundary=False)).content
    assert plain["stuff"] is None
    assert 0 < run(panoptic_scoring(files, boundary=True)).content["all"]["pq"] < plain["all"]["pq"]


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_errors_in_panoptic_files_are_reported(tmp_path):
    def check(message, fault):
        files = panoptic_set(tmp_path, num_images=2)
        fault(files)
        with pytest.raises(EvaluationError, match=message):
            run(panoptic_scoring(files, boundary=False))

    def in_predictions(change):
        return lambda files: edit(files.predictions, lambda content: change(content["annotations"]))

    def in_segments(change):  # the last annotation is city_0
        return in_predictions(lambda annotations: change(annotations[-1]["segments_info"]))

    def in_maps(write):
        return lambda files: write(files.prediction_masks / "0.png")

    check(r"no prediction for 1 of 2 images: city_1", in_predictions(lambda a: a.pop(0)))
    check(r"an annotation has no `image_id`", in_predictions(lambda a: a.append({})))
    check(r"image city_0: segment \d+ has category 8", in_segments(lambda s: s[0].update(category_id=8)))
    check(r"image city_0 .*0.png\): .*ids that are missing in the segment list", in_segments(lambda s: s.pop()))
    check(r"image city_0 .*no pixels in the map: \[77\]", in_segments(lambda s: s.append({"id": 77, "category_id": 3})))
    check(r"0.png does not exist", in_maps(lambda path: path.unlink()))
    check(r"image city_0 .*\(60, 80\), but .* has \(4, 5\)", in_maps(lambda p: write_ids(p, np.zeros((4, 5), int))))
    check(r"0.png: it is a gray png, but", in_maps(lambda p: write_labels(p, np.zeros((4, 5), np.uint8))))
    check(r"truth.json is not valid JSON", lambda files: files.truth.write_text("{"))
    check(r"truth.json has no list `categories`", lambda f: edit(f.truth, lambda content: content.pop("categories")))


def instance_set(folder, seed=0, num_images=12):
    """Write truth and results with polygons, both kinds of RLE, crowds, tied scores and images without objects."""
    rng = np.random.default_rng(seed)
    images, annotations, results = [], [], []
    for image_id in rng.permutation(np.arange(1, num_images + 1)).tolist():
        images.append({"id": image_id, "height": 100, "width": 120})
        for _ in range(int(rng.integers(0, 6))):
            x, y = rng.integers(0, 70, 2).tolist()
            w, h = rng.integers(4, 60, 2).tolist()
            mask = np.zeros((100, 120), np.uint8)
            mask[y : y + h, x : x + w] = 1
            rle = coco_masks.encode(np.asfortranarray(mask))
            crowd = int(rng.random() < 0.2)
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            flat = mask.T.ravel()
            runs = np.diff(np.flatnonzero(np.concatenate([[1], flat[1:] != flat[:-1], [1]]))).tolist()
            uncompressed = {"size": [100, 120], "counts": runs if flat[0] == 0 else [0, *runs]}
            text = {"size": rle["size"], "counts": rle["counts"].decode()}
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "iscrowd": crowd, "bbox": [x, y, w, h]}
            annotation |= {"category_id": int(rng.choice([2, 4, 60])), "area": w * h * float(rng.choice([1, 0.97]))}
            annotations.append(annotation | {"segmentation": uncompressed if crowd else (polygon, text)[w % 2]})
            for _ in range(3):
                moved = np.roll(mask, rng.integers(-4, 5, 2), axis=(0, 1))
                rle = coco_masks.encode(np.asfortranarray(moved))
                result = {"image_id": image_id, "category_id": int(rng.choice([annotation["category_id"], 4]))}
                result |= {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}
                results.append(result | {"score": float(np.round(rng.random(), 1))})
    categories = [{"id": k, "name": f"class {k}"} for k in (60, 4, 2, 90)]
    truth, found = folder / "truth.json", folder / "found.json"
    truth.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    found.write_text(json.dumps(results))
    return truth, found


def coco_stats(truth, found, use_classes=True):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluation = COCOeval(coco, coco.loadRes(json.loads(Path(found).read_text())), "segm")
        evaluation.params.useCats = int(use_classes)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(3))
def test_instance_files_score_as_pycocotools(seed, tmp_path):
    truth, found = instance_set(tmp_path, seed)
    oracle = coco_stats(truth, found)
    content = run(instance_scoring(truth, found, boundary=False, class_agnostic=False)).content
    assert [content[name] for name in STATS] == oracle.stats.tolist()
    assert list(content["per_class"]) == ["2", "4", "60", "90"]
    assert content["per_class"]["90"] == -1.0
    precision = oracle.eval["precision"][:, :, :, 0, 2]
    assert [content["per_class"][str(k)] for k in (2, 4, 60)] == [precision[:, :, i].mean() for i in range(3)]
    agnostic = run(instance_scoring(truth, found, boundary=False, class_agnostic=True)).content
    assert [agnostic[name] for name in STATS] == coco_stats(truth, found, use_classes=False).stats.tolist()
    assert agnostic["AR1000"] >= agnostic["AR100"]
    boundary = run(instance_scoring(truth, found, boundary=True, class_agnostic=False)).content
    assert 0 < boundary["AP"] < content["AP"]


def test_boxes_in_results_do_not_affect_mask_ap(tmp_path):
    """Mask2Former writes zero boxes, which detectron2 removes. In pycocotools they would change APs, APm and APl."""
    truth, found = instance_set(tmp_path)
    expected = run(instance_scoring(truth, found, boundary=False, class_agnostic=False))
    edit(found, lambda results: [r.update(bbox=[0, 0, 0, 0]) for r in results])
    assert run(instance_scoring(truth, found, boundary=False, class_agnostic=False)) == expected


def test_annotation_id_zero_is_matched_and_ap_is_zero_without_results(tmp_path):
    truth, found = instance_set(tmp_path)
    expected = run(instance_scoring(truth, found, boundary=False, class_agnostic=False))
    edit(truth, lambda c: [a.update(id=a["id"] - 1) for a in c["annotations"]])
    assert run(instance_scoring(truth, found, boundary=False, class_agnostic=False)) == expected
    found.write_text("[]")
    assert run(instance_scoring(truth, found, boundary=False, class_agnostic=False)).content["AP"] == 0.0
    edit(truth, lambda c: c["annotations"].clear())
    content = run(instance_scoring(truth, found, boundary=False, class_agnostic=False)).content
    assert {content[name] for name in STATS} == {-1.0}


def renumber(path, images, annotations):
    """Change the ids of images and annotations in a truth file."""

    def change(content):
        for image in content["images"]:
            image["id"] = images(image["id"])
        for annotation in content["annotations"]:
            annotation.update(id=annotations(annotation["id"]), image_id=images(annotation["image_id"]))

    edit(path, change)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "annotation_id", [lambda i: i - 1, lambda i: 7, lambda i: 2**31 + i, lambda i: -i, lambda i: f"box {i}"]
)
def test_ids_of_any_kind_score_as_in_pycocotools_after_renumbering(seed, annotation_id, tmp_path):
    """pycocotools loses matches of id 0 and keeps one annotation per id. Annotations with area 0 are small."""
    truth, found = instance_set(tmp_path, seed)
    edit(truth, lambda c: [a.update(area=0) for a in c["annotations"][::5]])
    expected = coco_stats(truth, found).stats.tolist()
    renumber(truth, lambda i: 2**33 + i, annotation_id)
    edit(found, lambda results: [r.update(image_id=2**33 + r["image_id"]) for r in results])
    content = run(instance_scoring(truth, found, boundary=False, class_agnostic=False)).content
    assert [content[name] for name in STATS] == expected


def test_errors_in_instance_files_are_reported(tmp_path):
    def check(message, fault):
        truth, found = instance_set(tmp_path)
        edit(found, lambda results: fault(results))
        with pytest.raises(UserError, match=message):
            run(instance_scoring(truth, found, boundary=False, class_agnostic=False))

    check(r"result 3 is for image 99, which .* does not list", lambda r: r[3].update(image_id=99))
    check(r"result 3 is for image '1', which", lambda r: r[3].update(image_id="1"))
    check(r"result 3 has a box but no `segmentation`", lambda r: r[3].update(bbox=r[3].pop("segmentation")))
    check(r"result 0 has category 7, which .*truth.json does not list", lambda r: r[0].update(category_id=7))
    check(r"image \d+: result 0 has category \[2\], which", lambda r: r[0].update(category_id=[2]))
    check(r"has score nan", lambda r: r[0].update(score=float("nan")))
    check(r"has no `score`", lambda r: r[0].pop("score"))
    check(r"has no `segmentation`", lambda r: r[0].pop("segmentation"))
    check(r"RLE is 9 x 8, but the image is", lambda r: r[0].update(segmentation={"size": [8, 9], "counts": "0"}))
    check(r"its RLE is damaged", lambda r: r[0]["segmentation"].update(counts="~~"))


def test_real_coco_truth_scores_as_pycocotools(real_data, tmp_path):
    truth = real_data / "coco_instances" / "annotations" / "instances_val2017.json"
    content, rng, results = json.loads(truth.read_text()), np.random.default_rng(0), []
    content["images"] = sorted(content["images"], key=lambda image: image["id"])[:15]
    kept = {image["id"] for image in content["images"]}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
    for annotation in content["annotations"]:
        if annotation["image_id"] in kept:
            mask = np.roll(coco.annToMask(annotation), rng.integers(-6, 7, 2), axis=(0, 1))
            rle = coco_masks.encode(np.asfortranarray(mask))
            results.append(
                {"image_id": annotation["image_id"], "category_id": annotation["category_id"]}
                | {"score": float(np.round(rng.random(), 2))}
                | {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}
            )
    (tmp_path / "found.json").write_text(json.dumps(results))
    report = run(
        instance_scoring(tmp_path / "truth.json", tmp_path / "found.json", boundary=False, class_agnostic=False)
    )
    oracle = coco_stats(tmp_path / "truth.json", tmp_path / "found.json")
    assert [report.content[name] for name in STATS] == oracle.stats.tolist()
    assert 0.1 < report.content["AP"] < 0.9


def test_real_panoptic_truth_scores_as_panopticapi(real_data, tmp_path):
    folder = real_data / "coco_panoptic"
    truth = folder / "annotations" / "panoptic_val2017.json"
    content = json.loads(truth.read_text())
    for annotation in content["annotations"]:
        rgb = cv2.imread(str(folder / "panoptic_val2017" / annotation["file_name"]))
        moved = np.pad(rgb, ((0, 0), (12, 0), (0, 0)))[:, :-12]
        (tmp_path / "found").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "found" / annotation["file_name"]), moved)
        present = set(np.unique(moved.astype(int) @ [65536, 256, 1]).tolist())
        annotation["segments_info"] = [s for s in annotation["segments_info"] if s["id"] in present]
    (tmp_path / "found.json").write_text(json.dumps(content))
    files = PanopticFiles(
        truth=truth,
        truth_masks=folder / "panoptic_val2017",
        predictions=tmp_path / "found.json",
        prediction_masks=tmp_path / "found",
    )
    # The result of panopticapi 7bb4655.
    assert run(panoptic_scoring(files, boundary=False)).content["all"]["pq"] == pytest.approx(0.4291689770, abs=5e-11)


def write_labels(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), values)


def test_label_maps_are_scored_in_three_conventions(tmp_path):
    rng = np.random.default_rng(0)
    confusion = np.zeros((5, 5))
    for name in ("a/one.png", "two.png", "b/c/three.png"):
        truth = rng.integers(0, 3, (20, 30)).astype(np.uint8)
        truth[:2] = 65
        predicted = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(0, 4, truth.shape)).astype(np.uint8)
        write_labels(tmp_path / "truth" / name, truth)
        write_labels(tmp_path / "found" / name, predicted.astype(np.uint16))
        np.add.at(confusion, (truth[2:], predicted[2:]), 1)
    content = run(semantic_scoring(tmp_path / "truth", tmp_path / "found", num_classes=5, ignore=65)).content
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    iou = confusion.diagonal()[:4] / union[:4]
    assert content["mIoU"] == pytest.approx(iou[:3].mean(), abs=1e-12)
    assert content["mIoU_union"] == pytest.approx(iou.mean(), abs=1e-12)
    assert content["mIoU_all_classes"] == pytest.approx(iou.sum() / 5, abs=1e-12)
    assert content["fwIoU"] == pytest.approx(iou[:3] @ confusion.sum(1)[:3] / confusion.sum(), abs=1e-12)
    assert content["mACC"] == pytest.approx((confusion.diagonal()[:3] / confusion.sum(1)[:3]).mean(), abs=1e-12)
    assert content["pACC"] == confusion.trace() / confusion.sum()
    assert content["IoU"] == [*iou, None]


def test_errors_in_label_maps_are_reported(tmp_path):
    truth, found = tmp_path / "truth", tmp_path / "found"
    write_labels(truth / "x.png", np.zeros((4, 4), np.uint8))

    def check(message, num_classes=3):
        with pytest.raises(EvaluationError, match=message):
            run(semantic_scoring(truth, found, num_classes=num_classes, ignore=255))

    check("found is not a folder")
    found.mkdir()
    check("does not contain 1 of 1 maps: x.png")
    write_labels(found / "x.png", np.full((4, 4), 9, np.uint8))
    check("x.png: the prediction has labels from 9 to 9")
    write_labels(found / "x.png", np.zeros((4, 5), np.uint8))
    check(r"x.png: the truth has shape \(4, 4\)")
    (found / "x.png").write_bytes(b"no image")
    check("x.png: it is not a JPEG, PNG, TIFF")
    check("number of classes is 0", num_classes=0)


def street_files(folder):
    ids = np.full((60, 80), 7, np.uint16)
    ids[10:40, 10:40], ids[10:40, 50:70] = 24000, 26
    write_labels(folder / "truth" / "aachen" / "aachen_000001_000019_gtFine_instanceIds.png", ids)
    write_labels(folder / "found" / "masks" / "person.png", (np.roll(ids, 2, axis=1) == 24000).astype(np.uint8) * 255)
    write_labels(folder / "found" / "masks" / "cars.png", (ids == 26).astype(np.uint8))
    lines = "masks/person.png 24 0.9\nmasks/cars.png 26 0.8\n"
    (folder / "found" / "aachen_000001_000019_leftImg8bit.txt").write_text(lines)
    labels = np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)
    write_labels(folder / "labels" / "aachen_000001_000019_pred.png", labels)
    return folder / "truth", folder / "found"


def test_cityscapes_files_are_scored(tmp_path):
    truth, found = street_files(tmp_path)
    content = run(cityscapes_instance_scoring(truth, found)).content
    # IoU 28/32 is a match at the 8 overlaps from 0.5 to 0.85. The group of cars does not count.
    assert content["AP"] == pytest.approx(0.8)
    assert content["per_class"]["24"]["AP50"] == 1.0
    assert content["per_class"]["26"] is None
    semantic = run(cityscapes_semantic_scoring(truth, tmp_path / "labels")).content
    assert semantic["IoU"] == semantic["iIoU"] == 1.0
    assert semantic["per_class"]["26"] == {"IoU": 1.0, "iIoU": None}


def test_maps_in_linked_folders_are_scored(tmp_path):
    truth, _ = street_files(tmp_path)
    (truth / "aachen").rename(tmp_path / "other_disk")
    (truth / "aachen").symlink_to(tmp_path / "other_disk")
    assert run(cityscapes_semantic_scoring(truth, tmp_path / "labels")).content["IoU"] == 1.0
    name = "aachen/aachen_000001_000019_gtFine_instanceIds.png"
    assert label_maps(truth, truth) == ([(name, name)], [])


def test_errors_in_cityscapes_files_are_reported(tmp_path):
    truth, found = street_files(tmp_path)
    text = found / "aachen_000001_000019_leftImg8bit.txt"

    def check(message, content):
        text.write_text(content)
        with pytest.raises(EvaluationError, match=message):
            run(cityscapes_instance_scoring(truth, found))

    check(r"leftImg8bit.txt, line 2: 'person' is not `MASK LABEL_ID SCORE`", "masks/cars.png 26 0.5\nperson\n")
    check(r"line 1: the mask \.\./a.png is outside", "../a.png 24 0.9\n")
    check(r"line 1: .*needs a label id", "masks/cars.png 99 0.9\n")
    check(r"nothing.png does not exist", "masks/nothing.png 24 0.9\n")
    write_labels(found / "masks" / "small.png", np.ones((2, 2), np.uint8))
    check(r"leftImg8bit.txt: a mask has shape \(2, 2\)", "masks/small.png 24 0.9\n")
    text.with_name("aachen_000001_000019_again.txt").write_text("")
    check(r"aachen_000001_000019 has several results", "")
    with pytest.raises(EvaluationError, match=r"no result for 1 of 1 images: aachen_000001_000019"):
        cityscapes_instance_scoring(truth, truth)
