"""`m2f score`: metrics of result files.

The results are equal to those of panopticapi, pycocotools, boundary-iou-api and cityscapesscripts.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2f.cluster.environment import usable_cores
from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import Progress, print_err, print_out
from m2f.cluster.verbs.arguments import count
from m2f.cluster.verbs.output_file import check_output, write_output

if TYPE_CHECKING:
    from m2f.eval.score.options import ScoreOptions
    from m2f.eval.score.scoring import ScoreReport, Scoring

SUMMARY = "score result files: panoptic, instances, semantic or Cityscapes"
EXAMPLE = "m2f score instances --truth instances_val.json --predictions results.json"
KINDS = {
    "panoptic": "PQ of COCO panoptic results, equal to panopticapi and boundary-iou-api",
    "instances": "mask AP of COCO results, equal to pycocotools and boundary-iou-api",
    "semantic": "mIoU and accuracies of label maps, equal to detectron2",
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
        kind.add_argument("--truth", required=True, type=Path, metavar=metavar, help="ground truth")
        kind.add_argument("--predictions", required=True, type=Path, metavar=metavar, help="predictions to score")
        kind.add_argument(
            "--output", type=Path, metavar="FILE", help="JSON file for all numbers, with ratios from 0 to 1"
        )
        kind.add_argument("--workers", type=count, metavar="N", help="number of processes (default: number of cores)")
    _add_options(parsers)
    panoptic, instances, semantic = (parsers[name] for name in ("panoptic", "instances", "semantic"))
    panoptic.add_argument(
        "--truth-masks", required=True, type=Path, metavar="DIR", help="folder of the PNG maps of the ground truth"
    )
    panoptic.add_argument(
        "--prediction-masks", required=True, type=Path, metavar="DIR", help="folder of the PNG maps of the predictions"
    )
    for kind in (panoptic, instances):
        kind.add_argument("--boundary", action="store_true", help="match by the smaller of mask and boundary IoU")
    instances.add_argument(
        "--class-agnostic", action="store_true", help="treat all classes as one, as for proposals; adds AR1000"
    )
    semantic.add_argument(
        "--num-classes", required=True, type=int, metavar="K", help="number of classes, with labels 0 to K - 1"
    )
    semantic.add_argument(
        "--ignore",
        type=int,
        metavar="V",
        help="value of pixels without a label (default: 255; 65535 for 256 or more classes)",
    )
    semantic.add_argument(
        "--void",
        type=int,
        metavar="V",
        help="value of pixels predicted without a class, which count as wrong (default: 255; 65535 for 256 or "
        "more classes)",
    )


def _add_options(parsers: Mapping[str, argparse.ArgumentParser]) -> None:
    """Add options that select images and classes, and options for additional outputs and metrics."""
    for name in ("panoptic", "instances", "semantic"):
        kind = parsers[name]
        kind.add_argument(
            "--report", type=Path, metavar="FILE", help="HTML page to write, with charts, errors and confusion matrix"
        )
        kind.add_argument(
            "--per-image", type=Path, metavar="FILE", help="parquet file to write, with metrics per image"
        )
        kind.add_argument(
            "--images", type=Path, metavar="FILE", help="score only the images in this file, one id or name per line"
        )
        kind.add_argument("--classes", nargs="+", metavar="C", help="score only these classes, by name or id")
    for name in ("panoptic", "instances"):
        kind = parsers[name]
        kind.add_argument(
            "--ignore-unknown",
            action="store_true",
            help="ignore predictions of categories that the ground truth does not have",
        )
        kind.add_argument(
            "--area-bounds",
            nargs=2,
            type=float,
            metavar="A",
            help="minimum areas of medium and large segments in pixels (default: 1024 9216)",
        )
    parsers["panoptic"].add_argument(
        "--by-size", action="store_true", help="also compute PQ of small, medium and large segments (slower)"
    )
    instances = parsers["instances"]
    instances.add_argument(
        "--boxes", action="store_true", help="also compute box AP, from given boxes or boxes around masks"
    )
    instances.add_argument(
        "--max-dets",
        nargs="+",
        type=int,
        metavar="N",
        help="maximum detections per image and class (default: 1 10 100)",
    )
    parsers["semantic"].add_argument(
        "--class-names", type=Path, metavar="FILE", help="file with class names, one per line"
    )


def run(args: argparse.Namespace) -> int:
    """Score the files, print the table, and write the requested files."""
    workers = args.workers or usable_cores()
    for option in ("output", "report", "per_image"):
        if (path := getattr(args, option, None)) is not None:
            check_output(f"--{option.replace('_', '-')}", path, creates_folder=False)
    print_err("scoring: reading the files")
    scoring = _open_scoring(args)
    with Progress("scoring", len(scoring.tasks), "images") as progress:
        found = scoring.evaluate(workers, progress.advance)
    report = scoring.report(found)
    try:
        print_out(report.table)  # first, so that a full disk does not lose it
    finally:  # also if the reader of a pipe has ended
        _write_files(args, scoring, found, report)
    return ExitStatus.DONE


def _write_files(args: argparse.Namespace, scoring: Scoring, found: Any, report: ScoreReport) -> None:
    """Write the JSON file, the HTML page and the parquet file if they are requested."""
    import json

    from m2f.eval.report.evaluation_page import evaluation_page

    if args.output is not None:
        write_output("--output", args.output, json.dumps(report.content, indent=1, allow_nan=False) + "\n")
    if getattr(args, "report", None) is not None:
        assert scoring.results is not None  # only without --class-agnostic
        write_output("--report", args.report, evaluation_page(scoring.results(found), {}, {}))
    if getattr(args, "per_image", None) is not None:
        write_output("--per-image", args.per_image, scoring.image_table())


def _options(args: argparse.Namespace) -> ScoreOptions:
    from m2f.eval.score.options import EVERYTHING, ScoreOptions, read_names

    bounds = getattr(args, "area_bounds", None)
    max_dets = getattr(args, "max_dets", None)
    return ScoreOptions(
        images=None if args.images is None else read_names(args.images),
        classes=None if args.classes is None else tuple(args.classes),
        ignore_unknown=getattr(args, "ignore_unknown", False),
        area_bounds=EVERYTHING.area_bounds if bounds is None else tuple(bounds),
        by_size=getattr(args, "by_size", False) or bounds is not None,
        max_dets=None if max_dets is None else tuple(max_dets),
    )


def _open_scoring(args: argparse.Namespace) -> Scoring:
    match args.kind:
        case "panoptic":
            from m2f.eval.score.panoptic import PanopticFiles, panoptic_scoring

            files = PanopticFiles(
                truth=args.truth,
                truth_masks=args.truth_masks,
                predictions=args.predictions,
                prediction_masks=args.prediction_masks,
            )
            detailed = args.report is not None
            return panoptic_scoring(files, boundary=args.boundary, detailed=detailed, options=_options(args))
        case "instances":
            from m2f.eval.errors import EvaluationError
            from m2f.eval.score.instances import instance_scoring

            if args.class_agnostic and (args.boxes or args.classes or args.report):
                raise EvaluationError("--class-agnostic cannot be combined with --boxes, --classes or --report")
            return instance_scoring(
                args.truth,
                args.predictions,
                boundary=args.boundary,
                class_agnostic=args.class_agnostic,
                boxes=args.boxes,
                detailed=args.report is not None,
                options=_options(args),
            )
        case "semantic":
            from m2f.eval.score.options import read_names
            from m2f.eval.score.semantic import semantic_scoring

            return semantic_scoring(
                args.truth,
                args.predictions,
                num_classes=args.num_classes,
                ignore=args.ignore,
                void=args.void,
                class_names=None if args.class_names is None else read_names(args.class_names, by_label=True),
                options=_options(args),
            )
        case "cityscapes-instances":
            from m2f.eval.score.cityscapes import cityscapes_instance_scoring

            return cityscapes_instance_scoring(args.truth, args.predictions)
        case _:
            from m2f.eval.score.cityscapes import cityscapes_semantic_scoring

            return cityscapes_semantic_scoring(args.truth, args.predictions)
