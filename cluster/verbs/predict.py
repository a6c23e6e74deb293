"""`m2f predict`: predict images, and write pictures and result files."""

from __future__ import annotations

import argparse

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import print_err, print_out
from m2f.cluster.verbs.arguments import OVERRIDE, add_checkpoint, add_model_source, count, split_overrides
from m2f.model.errors import ConfigError
from m2f.model.format_count import format_count

SUMMARY = "predict images, and write pictures and files in COCO formats or label maps"
EXAMPLE = "m2f predict runs/cells photos --output found"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_source(parser)
    parser.add_argument(
        "words",
        nargs="+",
        metavar="IMAGE",
        help=f"image files, folders or 'quoted*.jpg' patterns, local or s3://; {OVERRIDE} overrides a setting",
    )
    add_checkpoint(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="output folder")
    parser.add_argument(
        "--task",
        choices=("panoptic", "instance", "semantic"),
        help="task to predict (default: the task that the model was trained for)",
    )
    parser.add_argument(
        "--min-score",
        type=float,
        metavar="S",
        help="leave out segments, detections and pixels with a lower score, from 0 to 1 (default: object_threshold of "
        "the recipe for segments; 0 for detections, 0.5 in pictures; 0 for pixels)",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="precision of the forward pass (default: evaluation.precision)"
    )
    parser.add_argument(
        "--batch", type=count, default=1, metavar="N", help="images of equal shape per batch (default: 1)"
    )
    parser.add_argument("--no-pictures", action="store_true", help="write only the files")
    parser.add_argument(
        "--image-info", metavar="FILE", help="COCO JSON with the ids of images; only images in it are predicted"
    )
    parser.add_argument(
        "--submission", choices=("coco", "ade20k"), help="also write the zip file for this benchmark server"
    )
    parser.add_argument(
        "--algorithm",
        default="mask2former",
        metavar="NAME",
        help="name of the algorithm in the submission's file names (default: mask2former)",
    )


def run(args: argparse.Namespace) -> int:
    """Predict the images. Return exit status 1 if any image could not be used."""
    print_err(f"{args.source}: loading PyTorch")
    from dataclasses import replace
    from pathlib import Path

    from m2f.cluster.predict.benchmark_zip import check_submission, write_submission
    from m2f.cluster.predict.files import PredictionFolder, exclude_written_pictures
    from m2f.cluster.predict.inputs import find_images, match_image_list, number_images, read_image_list
    from m2f.cluster.predict.predict import Predictor, predict_images, prepare_process
    from m2f.cluster.predict.trained_model import open_trained
    from m2f.data_pipeline.storage.storage import Storage

    words, overrides = split_overrides(args.words)
    _check(args, words)
    storage, output = Storage(), Path(args.output)
    found = find_images(words, storage)
    urls = exclude_written_pictures(output, found)
    if num_written := len(found) - len(urls):
        print_err(f"left out {format_count(num_written, 'picture')} that an earlier prediction wrote into {output}")
    listed = read_image_list(Path(args.image_info)) if args.image_info else None
    images = number_images(urls) if listed is None else match_image_list(urls, listed)
    trained = open_trained(args.source, overrides, args.checkpoint)
    if args.precision is not None:
        trained = replace(trained, evaluation=replace(trained.evaluation, precision=args.precision))
    task = args.task or trained.task
    predictor = Predictor(trained, task, args.min_score)
    prepare_process(trained)
    if args.submission:
        check_submission(args.submission, task, trained.classes, listed, args.algorithm)

    options = {"pictures": not args.no_pictures, "shown_score": args.min_score}
    with PredictionFolder(output, predictor.classes, **options) as folder:
        problems = predict_images(predictor, images, storage, folder, args.batch)
    print_out(
        f"{len(images) - len(problems)} of {format_count(len(images), 'image')}: {args.output} (weights: "
        f"{trained.weights})"
    )
    if folder.num_empty:
        where = format_count(folder.num_empty, "image")
        print_out(f"no segment scored high enough to be drawn in {where}; use --min-score 0.1 to show more")
    if args.submission and not problems:
        written = write_submission(output, args.submission, task, images, listed, args.algorithm)
        print_out(f"submission: {written}")
    elif args.submission:
        print_err(
            f"no submission was written: it would lack {format_count(len(problems), 'image')}, so the server would "
            "reject it"
        )
    return ExitStatus.FAILED if problems else ExitStatus.DONE


def _check(args: argparse.Namespace, words: list[str]) -> None:
    from pathlib import Path

    if not words:
        raise ConfigError(f"no image is given, because {args.words[0]} overrides a setting; give files or folders")
    if "://" in args.output:
        raise ConfigError(f"--output is {args.output}; give a local folder, and copy the predictions from there")
    if Path(args.output).is_file():
        raise ConfigError(f"--output is {args.output}, which is a file; give a folder")
