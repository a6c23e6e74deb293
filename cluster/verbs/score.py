"""`m2f score`: metrics of result files, equal to panopticapi, pycocotools, boundary-iou-api and cityscapesscripts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from m2f.cluster.terminal import Progress, print_out
from m2f.cluster.verbs.arguments import count

if TYPE_CHECKING:
    from m2f.eval.score.scoring import Scoring

SUMMARY = "score result files: panoptic, instances, semantic or Cityscapes"
KINDS = {
    "panoptic": "PQ of COCO panoptic results, as panopticapi and boundary-iou-api",
    "instances": "mask AP of COCO results, as pycocotools and boundary-iou-api",
    "semantic": "mIoU and accuracies of label maps, as detectron2",
    "cityscapes-instances": "instance AP of Cityscapes results",
    "cityscapes-semantic": "IoU and iIoU of Cityscapes results",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    parsers = {
        name: kinds.add_parser(name, help=text, description=text, allow_abbrev=False) for name, text in KINDS.items()
    }
    for name, kind in parsers.items():
        metavar = "FILE" if name in ("panoptic", "instances") else "DIR"
        kind.add_argument("--truth", required=True, type=Path, metavar=metavar, help="annotations")
        kind.add_argument("--predictions", required=True, type=Path, metavar=metavar, help="results")
        kind.add_argument("--output", type=Path, metavar="FILE", help="JSON file for all numbers, shares from 0 to 1")
        kind.add_argument("--workers", type=count, metavar="N", help="processes (default: one per processor)")
    panoptic, instances, semantic = (parsers[name] for name in ("panoptic", "instances", "semantic"))
    panoptic.add_argument("--truth-masks", required=True, type=Path, metavar="DIR", help="its maps")
    panoptic.add_argument("--prediction-masks", required=True, type=Path, metavar="DIR", help="their maps")
    for kind in (panoptic, instances):
        kind.add_argument("--boundary", action="store_true", help="match by the smaller of mask and boundary IoU")
    instances.add_argument(
        "--class-agnostic", action="store_true", help="all classes as one, as for proposals; adds AR1000"
    )
    semantic.add_argument("--num-classes", required=True, type=int, metavar="K", help="labels are 0 to K - 1")
    semantic.add_argument("--ignore", type=int, default=255, metavar="V", help="value without label (default 255)")


def run(args: argparse.Namespace) -> int:
    """Print the table; the numbers go to --output."""
    import json
    import os

    from m2f.eval.errors import EvaluationError

    workers = args.workers or len(os.sched_getaffinity(0))
    if args.output is not None and not args.output.resolve().parent.is_dir():
        raise EvaluationError(f"--output {args.output}: the folder does not exist; make it first")
    scoring = _open(args)
    with Progress("scoring", len(scoring.jobs), "images") as progress:
        report = scoring.run(workers, progress.advance)
    if args.output is not None:
        args.output.write_text(json.dumps(report.content, indent=1, allow_nan=False) + "\n")
    print_out(report.table)
    return 0


def _open(args: argparse.Namespace) -> Scoring:
    match args.kind:
        case "panoptic":
            from m2f.eval.score.panoptic import PanopticFiles, panoptic_scoring

            files = PanopticFiles(
                truth=args.truth,
                truth_masks=args.truth_masks,
                predictions=args.predictions,
                prediction_masks=args.prediction_masks,
            )
            return panoptic_scoring(files, boundary=args.boundary)
        case "instances":
            from m2f.eval.score.instances import instance_scoring

            return instance_scoring(
                args.truth, args.predictions, boundary=args.boundary, class_agnostic=args.class_agnostic
            )
        case "semantic":
            from m2f.eval.score.semantic import semantic_scoring

            return semantic_scoring(args.truth, args.predictions, num_classes=args.num_classes, ignore=args.ignore)
        case "cityscapes-instances":
            from m2f.eval.score.cityscapes import cityscapes_instance_scoring

            return cityscapes_instance_scoring(args.truth, args.predictions)
        case _:
            from m2f.eval.score.cityscapes import cityscapes_semantic_scoring

            return cityscapes_semantic_scoring(args.truth, args.predictions)
