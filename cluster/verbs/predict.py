"""`m2f predict`: pictures and result files for images."""

from __future__ import annotations

import argparse

from cluster.verbs.arguments import OVERRIDE, add_checkpoint, add_trained, split_overrides

SUMMARY = "predict images: pictures to look at, and files in COCO formats or label maps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_trained(parser)
    parser.add_argument(
        "words", nargs="+", metavar="IMAGE", help=f"JPEG or PNG files or folders of them; {OVERRIDE} changes a setting"
    )
    add_checkpoint(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for what is written")
    parser.add_argument(
        "--task", choices=("panoptic", "instance", "semantic"), help="default: what the model was trained for"
    )


def run(args: argparse.Namespace) -> int:
    """Exit status 1 where some image could not be used."""
    from pathlib import Path

    from cluster.predict import Predictor, find_images, predict_images
    from cluster.progress import say
    from cluster.trained_model import open_trained
    from model.errors import ConfigError

    images, overrides = split_overrides(args.words)
    if "://" in args.output:
        raise ConfigError(f"--output is {args.output}; predictions are written to a local folder, copy them from there")
    paths = find_images(images)
    trained = open_trained(args.source, overrides, args.checkpoint)
    predictor = Predictor(trained, args.task or trained.task)
    problems = predict_images(predictor, paths, Path(args.output))
    say(f"{len(paths) - len(problems)} of {len(paths)} images: {args.output} (weights: {trained.weights})")
    return 1 if problems else 0
