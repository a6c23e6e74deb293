"""A COCO data set whose images encode their annotations, and a model that decodes them with errors.

The red channel of a pixel is 20 times its segment number. The model decodes the segments, but shifts some of them,
misclassifies some, and gives some low scores.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from m2f.data_pipeline.image_file import encode_png
from m2f.eval.metrics.rle import encode_masks, mask_areas, mask_boxes
from m2f.eval.report.coco_files import panoptic_png
from m2f.model.structures import Predictions

SIZE = (64, 96)
CATEGORIES = (
    {"id": 3, "name": "sea", "isthing": 0, "color": [0, 80, 200]},
    {"id": 11, "name": "boat", "isthing": 1, "color": [220, 30, 30]},
    {"id": 200, "name": "sky", "isthing": 0, "color": [120, 180, 240]},
    {"id": 7, "name": "buoy", "isthing": 1, "color": [240, 200, 0]},
)
NUM_SEGMENTS = 8


class SceneModel(nn.Module):
    """Model with one query per segment number. It shifts every third mask by 4 pixels; every seventh class is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def normalise(self, images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return images.float()

    def forward(self, images: torch.Tensor) -> Predictions:
        numbers = (images[:, 0, 2::4, 2::4] / 20).round().long().clamp(0, NUM_SEGMENTS)
        features = F.one_hot(numbers, NUM_SEGMENTS + 1).permute(0, 3, 1, 2).float() * 12 - 6
        features[:, ::3] = features[:, ::3].roll(1, -1)
        image_ids = images[:, 1, 0, 0].long()
        class_logits = torch.zeros(1, len(images), NUM_SEGMENTS + 1, len(CATEGORIES) + 1)
        for row, image_id in enumerate(image_ids.tolist()):
            for number in range(NUM_SEGMENTS + 1):
                correct = number % len(CATEGORIES)
                label = (correct + 1) % len(CATEGORIES) if (number + image_id) % 7 == 0 else correct
                class_logits[0, row, number, label] = 2.0 + 0.37 * ((number * 5 + image_id) % 8)
        return Predictions(class_logits, torch.eye(NUM_SEGMENTS + 1).expand(1, len(images), -1, -1), features)


def write_painted_scenes(folder: Path, count: int) -> None:
    """Write images, COCO panoptic and instance annotations, and ADE20K label maps of `count` scenes."""
    images, panoptic, instances = [], [], []
    for name in ("images", "panoptic", "labels"):
        (folder / name).mkdir(parents=True)
    for image_id in range(10, 10 + count):
        rng = np.random.default_rng(image_id)
        numbers = np.zeros(SIZE, np.int64)
        for number in range(1, NUM_SEGMENTS + 1):
            top, left = (int(rng.integers(0, side - 16)) for side in SIZE)
            numbers[top : top + int(rng.integers(8, 40)), left : left + int(rng.integers(8, 60))] = number
        pixels = np.stack([numbers * 20, np.full_like(numbers, image_id), np.full_like(numbers, 90)], -1)
        (folder / f"images/{image_id}.png").write_bytes(encode_png(pixels.astype(np.uint8)))
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": SIZE[0], "width": SIZE[1]})
        segments, labels = [], np.zeros(SIZE, np.uint8)
        for number in np.unique(numbers)[1:].tolist():
            mask = numbers == number
            category = CATEGORIES[number % len(CATEGORIES)]
            is_crowd = int(number == 5 and image_id % 2)
            fields = {"category_id": category["id"], "area": int(mask.sum()), "iscrowd": is_crowd}
            box = mask_boxes(encode_masks([mask]))[0].tolist()
            segments.append({"id": 300 * number, "bbox": box} | fields)
            labels[mask] = category["id"]
            if category["isthing"]:
                rle = encode_masks([mask])[0]
                entry = {"id": len(instances) + 1, "image_id": image_id, "bbox": box} | fields
                rle_text = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
                instances.append(entry | {"segmentation": rle_text})
                assert mask_areas([rle])[0] == fields["area"]
        (folder / f"panoptic/{image_id}.png").write_bytes(panoptic_png(numbers * 300))
        (folder / f"labels/{image_id}.png").write_bytes(encode_png(labels))
        panoptic.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments})
    shared = {"images": images, "categories": list(CATEGORIES)}
    (folder / "panoptic.json").write_text(json.dumps(shared | {"annotations": panoptic}))
    things = [category for category in CATEGORIES if category["isthing"]]
    document = {"images": images, "categories": things, "annotations": instances}
    (folder / "instances.json").write_text(json.dumps(document))
