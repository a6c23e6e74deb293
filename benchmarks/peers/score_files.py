"""Compare scoring from files with tools that read the same files: AP of COCO results, PQ of panoptic PNGs."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faster_coco_eval
import hotcoco
import numpy as np
import torch
from hotcoco.panoptic import PanopticEval
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from benchmarks.measure import Measurement, compare
from m2f.eval.score.instances import instance_scoring
from m2f.eval.score.panoptic import PanopticFiles, panoptic_scoring

STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_TOLERANCES = {"pycocotools": 0.0, "faster-coco-eval": 1e-15, "hotcoco": 0.0}
"""Largest relative error: above 0 only for faster-coco-eval, which adds the values of a mean in a different order."""


@dataclass(frozen=True)
class ScoreFiles:
    """Files of one image set, for instance and panoptic scoring."""

    instances: Path
    results: Path
    panoptic: PanopticFiles


def write_instances(
    folder: Path, dataset: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> tuple[Path, Path]:
    """Write ground truth and results as JSON with compressed run lengths; return both paths."""
    truth_path, results_path = folder / "instances.json", folder / "results.json"
    annotations = [_with_text(entry) for entry in dataset["annotations"]]
    truth_path.write_text(json.dumps({**dataset, "annotations": annotations}))
    results_path.write_text(json.dumps([_with_text(entry) for entry in results]))
    return truth_path, results_path


def _with_text(entry: Mapping[str, Any]) -> dict[str, Any]:
    mask = entry["segmentation"]
    return {**entry, "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()}}


def run(files: ScoreFiles, shape: str, slow_pq: Callable[[], Sequence[Tensor]], repeats: int) -> list[Measurement]:
    """Compare AP and PQ of the set with every tool; times are for the whole set.

    `slow_pq` runs panopticapi's algorithm on the same maps.
    """
    peers = {
        "pycocotools": lambda: _coco_stats(COCO, COCOeval, files),
        "faster-coco-eval": lambda: _coco_stats(faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster, files),
        "hotcoco": lambda: _coco_stats(hotcoco.COCO, hotcoco.COCOeval, files),
    }
    rows = [
        compare("AP from files", shape, lambda: _our_stats(files), name, peer, _TOLERANCES[name], repeats)
        for name, peer in peers.items()
    ]
    for name, quality in (("panopticapi's algorithm", slow_pq), ("hotcoco", lambda: _hotcoco_pq(files))):
        rows.append(compare("PQ from files", shape, lambda: _our_pq(files), name, quality, 1e-12, repeats))
    return rows


def _our_stats(files: ScoreFiles) -> Sequence[Tensor]:
    scoring = instance_scoring(files.instances, files.results, boundary=False, class_agnostic=False)
    content = scoring.run(1, lambda _: None).content
    return [torch.tensor([content[name] for name in STATS], dtype=torch.float64)]


def _coco_stats(dataset: Any, evaluator: Any, files: ScoreFiles) -> Sequence[Tensor]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = dataset(str(files.instances))
        evaluation = evaluator(truth, truth.loadRes(str(files.results)), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [torch.tensor(np.asarray(evaluation.stats)[:12], dtype=torch.float64)]


def _our_pq(files: ScoreFiles) -> Sequence[Tensor]:
    per_class = panoptic_scoring(files.panoptic, boundary=False).run(1, lambda _: None).content["per_class"]
    return [_counts(per_class[str(k)] for k in sorted(map(int, per_class)))]


def _hotcoco_pq(files: ScoreFiles) -> Sequence[Tensor]:
    paths = files.panoptic
    evaluation = PanopticEval(
        paths.truth, paths.predictions, gt_folder=paths.truth_masks, pred_folder=paths.prediction_masks
    )
    evaluation.evaluate()
    per_class = evaluation.results()["per_class"]
    return [_counts(per_class[k] for k in sorted(per_class))]


def _counts(rows: Any) -> Tensor:
    return torch.tensor([[row[name] for name in ("iou", "tp", "fp", "fn")] for row in rows], dtype=torch.float64)
