"""Evaluate a synthetic image, and print the peak memory of this process in MB.

Arguments: height, width, test time (whole, multi_scale or windows), comma-separated tasks, queries. The model returns
random predictions of 150 classes, because the memory of a network depends on its input size, not on the image. If there
are several tasks, the extra metrics of masks are computed too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from m2f.data_pipeline.categories import TASKS, Category, CategoryTable
from m2f.data_pipeline.sample import Annotation, DecodedSample, Segment
from m2f.data_pipeline.transforms.collate import collate_eval
from m2f.eval.config import EvaluationConfig, MultiScale, SlidingWindows, WholeImage
from m2f.eval.inference.evaluator import Evaluator
from m2f.eval.results.results import EvaluationSubject
from m2f.model.config import PostprocessConfig
from m2f.model.structures import Predictions

CLASSES, CHANNELS = 150, 256
TABLE = CategoryTable(tuple(Category(i + 1, f"class {i}", i < 100, (i, 0, 255 - i)) for i in range(CLASSES)))
TEST_TIMES = {"whole": WholeImage(), "multi_scale": MultiScale(), "windows": SlidingWindows()}


class Blobs(nn.Module):
    """Model that predicts smooth random masks with confident classes."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.queries = queries
        self.anchor = nn.Parameter(torch.zeros(1))

    def normalise(self, images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return images.float()

    def forward(self, images: torch.Tensor) -> Predictions:
        generator = torch.Generator().manual_seed(0)
        height, width = (side // 4 for side in images.shape[-2:])
        coarse = torch.randn(1, CHANNELS, 8, 8, generator=generator)
        features = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        logits = torch.randn(1, 1, self.queries, CLASSES + 1, generator=generator)
        labels = torch.randint(0, CLASSES, (self.queries,), generator=generator)
        logits[..., torch.arange(self.queries), labels] += 12
        return Predictions(logits, torch.randn(1, 1, self.queries, CHANNELS, generator=generator) / 4, features)


def sample(height: int, width: int) -> DecodedSample:
    """Return a sample of sixty rectangles, each with its own grey level."""
    rng = np.random.default_rng(0)
    seg = cv2.resize(rng.permutation(60).reshape(6, 10).astype(np.uint8) + 1, (width, height), interpolation=0)
    segments = tuple(
        Segment(
            id=i,
            category_id=i,
            is_thing=TABLE.by_id[i].is_thing,
            is_crowd=False,
            area=float((seg == i).sum()),
            bbox=(0.0, 0.0, 1.0, 1.0),
            source_id=i,
            map="seg",
        )
        for i in range(1, 61)
    )
    image = np.repeat(seg[..., None] * 4, 3, axis=2)
    annotation = Annotation(seg=seg, inst=None, segments=segments)
    return DecodedSample(key="k", image_id=1, source="made", image=image, annotation=annotation)


def main() -> None:
    height, width, test_time = int(sys.argv[1]), int(sys.argv[2]), TEST_TIMES[sys.argv[3]]
    tasks, queries = tuple(task for task in TASKS if task in sys.argv[4].split(",")), int(sys.argv[5])
    config = EvaluationConfig(tasks=tasks, extra_metrics=("boundary", "class_agnostic") if len(tasks) > 1 else ())
    evaluator = Evaluator(
        Blobs(queries),
        TABLE,
        config,
        model_task="panoptic",
        postprocess=PostprocessConfig(max_instances=queries),
        test_time=test_time,
        panel_ids=[1],
    )
    edge, longest = (512, 2048) if max(height, width) <= 2048 else (800, 1333)
    states = evaluator.evaluate_batch(collate_eval([sample(height, width)], (0,), edge, longest))
    subject = EvaluationSubject(dataset="probe", fingerprint="f" * 64)
    assert states.compute(TABLE, subject).num_images == 1
    sys.stdout.write(f"{peak_kb() // 1024}\n")


def peak_kb() -> int:
    """Return the peak memory of this process in kB. `ru_maxrss` would include that of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


if __name__ == "__main__":
    main()
