"""A tiny COCO data set for tests that introduce faults; not a test module."""

from __future__ import annotations

import json

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.sources import CocoInstancesSource, CocoPanopticSource

H, W = 20, 30
IDS = (5, 70_000)
POLYGON = [2.0, 2.0, 12.0, 2.0, 12.0, 9.0, 2.0, 9.0]


def mask_of(top, left, bottom, right):
    mask = np.zeros((H, W), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def rle_of(mask, compressed=True):
    if compressed:
        rle = coco_mask.encode(np.asfortranarray(mask))
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    flat = mask.ravel(order="F")
    starts = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    return {"size": [H, W], "counts": np.diff([0, *starts, flat.size]).tolist()}


class CocoSet:
    """Builder of a tiny COCO data set. Tests change its fields to introduce faults, then write and read it."""

    def __init__(self, root):
        self.root = root
        self.images = [{"id": 40, "file_name": "a.jpg", "height": H, "width": W}]
        self.categories = [
            {"id": 3, "name": "cat", "isthing": 1, "color": [1, 2, 3]},
            {"id": 90, "name": "sky", "isthing": 0},
        ]
        self.panoptic = [
            {
                "image_id": 40,
                "file_name": "a.png",
                "segments_info": [
                    {"id": IDS[0], "category_id": 90, "area": 400, "bbox": [0, 0, W, H], "iscrowd": 0},
                    {"id": IDS[1], "category_id": 3, "area": 50, "bbox": [5, 4, 10, 5], "iscrowd": 1},
                ],
            }
        ]
        self.instances = [
            {"id": 1, "image_id": 40, "category_id": 3, "area": 70.5, "bbox": [2, 2, 10, 7], "iscrowd": 0}
            | {"segmentation": [POLYGON]},
            {"id": 2, "image_id": 40, "category_id": 3, "area": 60, "bbox": [8, 5, 6, 10], "iscrowd": 0}
            | {"segmentation": rle_of(mask_of(5, 8, 15, 14))},
            {"id": 3, "image_id": 40, "category_id": 3, "area": 40, "bbox": [20, 0, 10, 4], "iscrowd": 1}
            | {"segmentation": rle_of(mask_of(0, 20, 4, 30), compressed=False)},
        ]
        self.ids = np.full((H, W), IDS[0], np.uint32)
        self.ids[4:9, 5:15] = IDS[1]
        self.ids[19] = 0
        pixels = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
        self.files = {"a.jpg": cv2.imencode(".jpg", pixels)[1].tobytes()}

    def write(self):
        for folder in ("images", "masks"):
            (self.root / folder).mkdir(exist_ok=True)
        for name, data in self.files.items():
            (self.root / "images" / name).write_bytes(data)
        rgb = np.stack([self.ids & 255, self.ids >> 8 & 255, self.ids >> 16], axis=-1)
        (self.root / "masks" / "a.png").write_bytes(encode_png(rgb.astype(np.uint8)))
        for name in ("panoptic", "instances"):
            document = {"images": self.images, "categories": self.categories, "annotations": getattr(self, name)}
            (self.root / f"{name}.json").write_text(json.dumps(document))

    @property
    def panoptic_source(self):
        root = str(self.root)
        return CocoPanopticSource(
            images=f"{root}/images", panoptic_json=f"{root}/panoptic.json", panoptic_masks=f"{root}/masks"
        )

    @property
    def instances_source(self):
        return CocoInstancesSource(images=f"{self.root}/images", instances_json=f"{self.root}/instances.json")

    def read_panoptic(self, **options):
        return self._read(self.panoptic_source, options)

    def read_instances(self, **options):
        return self._read(self.instances_source, options)

    def _read(self, source, options):
        self.write()
        sample = open_reader(source, **options).read(0)
        if sample.left_out and not options.get("skip_bad"):
            raise DataError("\n".join(sample.left_out))
        return sample
