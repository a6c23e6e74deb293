"""`m2f verify`: check whether sharded data sets are complete and undamaged."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import Progress, print_out
from m2f.cluster.verbs.arguments import add_threads_and_report, format_faults
from m2f.model.format_count import format_count

if TYPE_CHECKING:
    from m2f.data_pipeline.shards.verify import Depth, Verification
    from m2f.data_pipeline.storage.storage import Storage

SUMMARY = "verify sharded data sets: sizes only, or every byte, sample and label"
EXAMPLE = "m2f verify shards/cells/train --full"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("urls", nargs="+", metavar="URL", help="folder or s3:// prefix with a dataset.json")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--quick", action="store_true", help="check the manifest, and existence and size of all shards (default)"
    )
    depth.add_argument("--full", action="store_true", help="read everything: check checksums, pixels and labels")
    add_threads_and_report(parser, "shards")


def run(args: argparse.Namespace) -> int:
    """Verify the data sets. Return exit status 1 if a fault was found."""
    import json
    import os
    from dataclasses import asdict

    from m2f.data_pipeline.storage.storage import Storage

    threads = args.threads or os.cpu_count() or 1
    storage = Storage()
    found = [_verify(url, storage, "full" if args.full else "quick", threads) for url in args.urls]
    for verification in found:
        print_out(_summary(verification, args.report))
    if args.report:
        entries = [{**asdict(verification), "passed": verification.passed} for verification in found]
        storage.put(args.report, json.dumps(entries, indent=1).encode())
    return ExitStatus.DONE if all(verification.passed for verification in found) else ExitStatus.FAILED


def _verify(url: str, storage: Storage, depth: Depth, threads: int) -> Verification:
    """Verify one data set, with a progress bar."""
    from contextlib import ExitStack

    from m2f.data_pipeline.shards.manifest import Manifest
    from m2f.data_pipeline.shards.verify import verify

    bars: list[Progress] = []
    with ExitStack() as stack:

        def start(manifest: Manifest) -> None:
            bars.append(stack.enter_context(Progress(f"verifying {url}", manifest.num_samples, "samples")))

        return verify(url, storage, depth, threads, start, lambda samples, size: bars[0].advance(samples, size))


def _summary(found: Verification, report: str | None) -> str:
    """Return text that states that the data set is complete, or lists its faults."""
    size = f"{format_count(found.num_samples, 'sample')} in {format_count(found.num_shards, 'shard')}"
    size += f", {found.num_bytes / 1e6:,.1f} MB"
    if found.passed:
        read = (
            "all bytes and samples are valid" if found.depth == "full" else "all shards exist and have the right size"
        )
        return f"{found.url}: {size}: {read}"
    lines = [f"{found.url}: {size}: {format_count(len(found.faults), 'fault')}"]
    return "\n".join(lines + format_faults(found.faults, report))
