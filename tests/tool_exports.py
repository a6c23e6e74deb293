"""Write tiny data sets in the export formats of labelling tools, following their documentation."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from m2f.data_pipeline.image_file import encode_png

SIZE = 64
COUNT = 6
CLASSES = ("cell", "dirt")


def square(number: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the cell in an image."""
    return 8 + number, 10, 30 + number, 32


def write_image(path: Path, number: int) -> None:
    """Write a dark image with a bright cell and a grey speck of dirt."""
    image = np.full((SIZE, SIZE, 3), 40, np.uint8)
    x0, y0, x1, y1 = square(number)
    image[y0:y1, x0:x1] = 220
    image[45:55, 45:55] = 120
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(image))


def class_map(number: int) -> np.ndarray:
    """Return the label map of an image: 0 is background, 1 cell, 2 dirt."""
    values = np.zeros((SIZE, SIZE), np.uint8)
    x0, y0, x1, y1 = square(number)
    values[y0:y1, x0:x1] = 1
    values[45:55, 45:55] = 2
    return values


def rings(number: int) -> list[list[float]]:
    """Return the polygons of the cell and the dirt."""
    x0, y0, x1, y1 = square(number)
    return [[x0, y0, x1, y0, x1, y1, x0, y1], [45, 45, 55, 45, 55, 55, 45, 55]]


def yolo_seg(folder: Path) -> None:
    """Write the format of Ultralytics: images/SPLIT, labels/SPLIT, data.yaml."""
    for number in range(COUNT):
        split = "val" if number > 3 else "train"
        write_image(folder / f"images/{split}/im{number}.png", number)
        label = folder / f"labels/{split}/im{number}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{k} " + " ".join(f"{v / SIZE:.6f}" for v in ring) for k, ring in enumerate(rings(number))]
        label.write_text("\n".join(lines) + "\n")
    (folder / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cell\n  1: dirt\n")


def labelme(folder: Path) -> None:
    """Write the format of labelme: a JSON file beside every image. The dirt is a mask."""
    for number in range(COUNT):
        write_image(folder / f"im{number}.png", number)
        ring = np.array(rings(number)[0], float).reshape(-1, 2)
        mask = base64.b64encode(encode_png(np.full((10, 10), 255, np.uint8))).decode()
        shapes = [
            {"label": "cell", "points": ring.tolist(), "group_id": None, "shape_type": "polygon", "flags": {}},
            {"label": "dirt", "points": [[45, 45], [54, 54]], "group_id": None, "shape_type": "mask", "mask": mask},
        ]
        document = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"im{number}.png"}
        document |= {"imageData": None, "imageHeight": SIZE, "imageWidth": SIZE}
        (folder / f"im{number}.json").write_text(json.dumps(document))


def cvat(folder: Path) -> None:
    """Write CVAT for images 1.1: annotations.xml and images/. The dirt is a run-length encoded mask."""
    images = []
    for number in range(COUNT):
        write_image(folder / f"images/im{number}.png", number)
        corners = np.array(rings(number)[0], float).reshape(-1, 2)
        points = ";".join(f"{x:.2f},{y:.2f}" for x, y in corners)
        images.append(
            f'<image id="{number}" name="im{number}.png" width="{SIZE}" height="{SIZE}">'
            f'<polygon label="cell" source="manual" occluded="0" points="{points}" z_order="0"></polygon>'
            '<mask label="dirt" source="manual" occluded="0" rle="0, 100" left="45" top="45" width="10" height="10" '
            'z_order="1"></mask></image>'
        )
    labels = "".join(f"<label><name>{name}</name></label>" for name in CLASSES)
    (folder / "annotations.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta><task><labels>'
        f"{labels}</labels></task></meta>{''.join(images)}</annotations>"
    )


def voc(folder: Path) -> None:
    """Write Segmentation mask 1.1: JPEGImages, SegmentationClass, SegmentationObject, ImageSets, labelmap.txt."""
    for number in range(COUNT):
        write_image(folder / f"JPEGImages/im{number}.png", number)
        for name in ("SegmentationClass", "SegmentationObject"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"im{number}.png").write_bytes(encode_png(class_map(number)))
    sets = folder / "ImageSets/Segmentation"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("".join(f"im{i}\n" for i in range(4)))
    (sets / "val.txt").write_text("im4\nim5\n")
    (folder / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncell:128,0,0::\ndirt:0,128,0::\n"
    )


def mask_pngs(folder: Path) -> None:
    """Write images, and grey maps whose names end in `_mask`."""
    for number in range(COUNT):
        write_image(folder / f"images/im{number}.png", number)
        (folder / "masks").mkdir(exist_ok=True)
        (folder / f"masks/im{number}_mask.png").write_bytes(encode_png(class_map(number)))


def camvid(folder: Path) -> None:
    """Write the format of CamVid: colour maps whose names end in `_L`, and label_colors.txt."""
    colors = np.array([(0, 0, 0), (128, 64, 128), (64, 0, 192)], np.uint8)
    for number in range(COUNT):
        write_image(folder / f"701_StillsRaw_full/im{number}.png", number)
        (folder / "LabeledApproved_full").mkdir(exist_ok=True)
        (folder / f"LabeledApproved_full/im{number}_L.png").write_bytes(encode_png(colors[class_map(number)]))
    (folder / "label_colors.txt").write_text("0 0 0\tVoid\n128 64 128\tcell\n64 0 192\tdirt\n")


def _coco(names: list[str], first: int, categories: list[dict]) -> str:
    annotations = [
        {"id": 2 * i + k, "image_id": i, "category_id": k + first, "segmentation": [ring], "iscrowd": 0}
        for i in range(len(names))
        for k, ring in enumerate(rings(int(Path(names[i]).stem[2:])))
    ]
    images = [{"id": i, "file_name": name, "height": SIZE, "width": SIZE} for i, name in enumerate(names)]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories})


def roboflow(folder: Path) -> None:
    """Write Roboflow's COCO: SPLIT/_annotations.coco.json beside the images. Class 0 is an unused supercategory."""
    categories = [{"id": 0, "name": "cells", "supercategory": "none"}]
    categories += [{"id": k + 1, "name": name, "supercategory": "cells"} for k, name in enumerate(CLASSES)]
    for split, numbers in (("train", range(4)), ("valid", range(4, COUNT))):
        for number in numbers:
            write_image(folder / split / f"im{number}.png", number)
        names = [f"im{number}.png" for number in numbers]
        (folder / split / "_annotations.coco.json").write_text(_coco(names, 1, categories))


def label_studio(folder: Path) -> None:
    """Write Label Studio's COCO: result.json, whose file names begin with images/."""
    for number in range(COUNT):
        write_image(folder / f"images/im{number}.png", number)
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASSES)]
    names = [f"images/im{number}.png" for number in range(COUNT)]
    (folder / "result.json").write_text(_coco(names, 0, categories))


def cvat_coco(folder: Path) -> None:
    """Write CVAT's COCO 1.0: annotations/instances_default.json and images/."""
    for number in range(COUNT):
        write_image(folder / f"images/default/im{number}.png", number)
    (folder / "annotations").mkdir()
    categories = [{"id": k + 1, "name": name, "supercategory": ""} for k, name in enumerate(CLASSES)]
    names = [f"im{number}.png" for number in range(COUNT)]
    (folder / "annotations/instances_default.json").write_text(_coco(names, 1, categories))


def hugging_face(folder: Path) -> None:
    """Write the Hugging Face format: in colour PNGs, red is the class and green the instance; 0 is void."""
    for number in range(COUNT):
        write_image(folder / f"images/im{number}.png", number)
        (folder / "annotations").mkdir(exist_ok=True)
        values = class_map(number)
        (folder / f"annotations/im{number}.png").write_bytes(
            encode_png(np.stack([values, values * 0 + (values > 0), values * 0], axis=-1))
        )
    (folder / "classes.json").write_text(json.dumps([{"label": k + 1, "name": n} for k, n in enumerate(CLASSES)]))


EXPORTS: dict[str, Callable[[Path], None]] = {
    "yolo_seg": yolo_seg,
    "labelme": labelme,
    "cvat": cvat,
    "voc": voc,
    "label_maps": mask_pngs,
    "color_maps": camvid,
    "roboflow": roboflow,
    "label_studio": label_studio,
    "cvat_coco": cvat_coco,
    "huggingface": hugging_face,
}
