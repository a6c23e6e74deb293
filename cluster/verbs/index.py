"""`m2f index`: write a manifest for existing WebDataset tars."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import Progress, print_out
from m2f.cluster.verbs.arguments import add_threads_and_report, count, format_faults
from m2f.model.errors import ConfigError
from m2f.model.format_count import format_count

if TYPE_CHECKING:
    from m2f.data_pipeline.shards.index import IndexReport

SUMMARY = "write a manifest for existing WebDataset tars, without changing them"
EXAMPLE = "m2f index s3://bucket/tars --output s3://bucket/cells --categories categories.json --labels panoptic"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("urls", nargs="+", metavar="URL", help="tars, or folders or s3:// prefixes with tars")
    parser.add_argument("--output", required=True, metavar="URL", help="folder or s3:// prefix for the manifest")
    parser.add_argument(
        "--categories", required=True, metavar="FILE", help="JSON list of {label, name, isthing, color}, or a COCO JSON"
    )
    parser.add_argument(
        "--labels",
        choices=("classes", "instances", "panoptic"),
        help="encoding of the maps: classes: grey values; instances: class in red, instance in green and blue; "
        "panoptic: COCO panoptic PNG with segments_info in JSON. Not needed for shards that m2f wrote",
    )
    parser.add_argument("--image", default="jpg", metavar="EXT", help="extension of the image (default: jpg or jpeg)")
    parser.add_argument("--map", default="png", metavar="EXT", help="extension of the label map (default: png)")
    parser.add_argument("--json", default="json", metavar="EXT", help="panoptic: extension of the JSON (default: json)")
    parser.add_argument(
        "--void", metavar="N,N", default="", help="labels of void pixels, in addition to 255 (and 0 for instances)"
    )
    parser.add_argument(
        "--max-pixels", type=count, metavar="N", help="refuse images with more pixels (default: 178956970)"
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out samples that cannot be indexed")
    add_threads_and_report(parser, "tars")


def run(args: argparse.Namespace) -> int:
    """Index the tars. Return exit status 1 if no manifest was written, because some samples cannot be indexed."""
    import json
    import os
    from dataclasses import asdict

    from m2f.data_pipeline.config import DatasetConfig
    from m2f.data_pipeline.readers.category_file import read_category_file
    from m2f.data_pipeline.shards.index import IndexOptions, detect_format, find_tars, index_tars
    from m2f.data_pipeline.storage.storage import Storage

    threads = args.threads or os.cpu_count() or 1
    storage = Storage()
    categories, void = read_category_file(args.categories, _numbers(args.void))
    options = IndexOptions(
        categories=categories,
        void=void,
        labels=args.labels,
        image=args.image,
        map=args.map,
        json=args.json,
        max_pixels=args.max_pixels or DatasetConfig.max_pixels,
    )
    tars = find_tars(args.urls, storage)
    tar_format = detect_format(tars[0], options, storage)
    total = sum(storage.size(tar) for tar in tars)
    with Progress("indexing", total / 1e6, "MB") as progress:
        report = index_tars(
            tars,
            args.output,
            tar_format,
            options,
            storage,
            skip_bad=args.skip_bad,
            threads=threads,
            on_progress=lambda _, num_bytes: progress.advance(num_bytes / 1e6),
        )
    print_out(_summary(report, args.output, args.report))
    if args.report:
        storage.put(args.report, json.dumps(asdict(report), indent=1).encode())
    return ExitStatus.DONE if report.committed else ExitStatus.FAILED


def _numbers(text: str) -> tuple[int, ...]:
    """Parse comma-separated integers. Raises ConfigError if a part is not an integer."""
    try:
        return tuple(int(number) for number in text.split(",") if number)
    except ValueError:
        raise ConfigError(f"--void is {text!r}; give integers separated by commas, for example 0,255") from None


def _summary(found: IndexReport, target: str, report: str | None) -> str:
    """Return text that states what was indexed and lists the faults."""
    samples, tars = format_count(found.num_samples, "sample"), format_count(found.num_shards, "tar")
    size = f"{samples} of {tars}, {found.num_bytes / 1e6:,.1f} MB"
    if isinstance(found.form, str):
        description = "shards of m2f"
    else:
        description = f"image .{' or .'.join(found.form.images)}, {found.form.labels} in .{found.form.map}"
        description += f" and .{found.form.json}" if found.form.json else ""
    lines = [f"{target}: {size} ({description})", *format_faults(found.faults, report)]
    if found.renumbered:
        lines.append("image ids in the tars repeat; the manifest replaces them by the positions of the samples")
    if not found.committed:
        lines.append(
            f"faults: {len(found.faults)}. No manifest was written; correct the samples, or leave them out with "
            "--skip-bad"
        )
    return "\n".join(lines)
