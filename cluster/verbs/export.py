"""`m2f export`: write a trained model in a format of other tools."""

from __future__ import annotations

import argparse

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import print_err, print_out
from m2f.cluster.verbs.arguments import add_checkpoint, add_model_source, add_overrides

SUMMARY = "export a trained model as official checkpoint, Hugging Face folder, torch.export program or ONNX"
EXAMPLE = "m2f export runs/cells --format onnx --output cells.onnx"
FORMATS = ("official", "hugging_face", "torch_export", "onnx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_source(parser)
    add_overrides(parser)
    add_checkpoint(parser)
    parser.add_argument("--format", required=True, choices=FORMATS, help="output format")
    parser.add_argument(
        "--output", required=True, metavar="PATH", help="file (.pth, .pt2, .onnx), or folder for hugging_face"
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="fixed input size of torch_export and onnx, divisible by 32 (default: any size divisible by 32)",
    )


def run(args: argparse.Namespace) -> int:
    print_err(f"{args.source}: loading PyTorch")
    from pathlib import Path

    from m2f.cluster.predict.export import check_output, write_model
    from m2f.cluster.predict.trained_model import open_trained

    check_output(args.format, args.output, args.size)
    trained = open_trained(args.source, args.overrides, args.checkpoint)
    size = None if args.size is None else (args.size[0], args.size[1])
    written = write_model(trained, args.format, Path(args.output), size)
    print_out(f"{args.output}: {written} (weights: {trained.weights})")
    return ExitStatus.DONE
