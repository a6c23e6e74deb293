"""`m2f checkpoint`: what checkpoints a run has, and whether every byte of them is right."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cluster.verbs.arguments import add_recipe

if TYPE_CHECKING:
    from data_pipeline.storage import Storage
    from trainer.reporting import CommittedCheckpoint

SUMMARY = "list the checkpoints of a run, or verify every byte of them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "action",
        choices=("ls", "verify"),
        help="ls: a table, with files and sizes compared; verify: read all files and compare checksums",
    )
    add_recipe(parser)
    parser.add_argument("--step", type=int, help="this checkpoint only; default: all")


def run(args: argparse.Namespace) -> int:
    """Exit status 1 where a checkpoint is damaged."""
    from cluster.checkpoints import choose_checkpoint
    from cluster.progress import say
    from cluster.recipe import load_recipe
    from data_pipeline.storage import Storage
    from trainer.checkpoint_folder import list_checkpoints
    from trainer.reporting import CommittedCheckpoint

    config = load_recipe(args.recipe, args.overrides)
    storage = Storage(config.storage)
    chosen = choose_checkpoint(config, storage, None if args.step is None else str(args.step))
    found = list_checkpoints(storage, config.run_folder)
    if args.step is not None:
        found = (CommittedCheckpoint(args.step, chosen.url),)
    say(f"{'step':>8} {'MB':>9} {'files':>6} {'ranks':>6} {'ZeRO':>5}  state")
    states = [_state(storage, checkpoint, every_byte=args.action == "verify") for checkpoint in found]
    return 0 if all(states) else 1


def _state(storage: Storage, checkpoint: CommittedCheckpoint, every_byte: bool) -> bool:
    """Print one row; whether the checkpoint is whole."""
    from cluster.progress import say
    from trainer.checkpoint_folder import pins, read_manifest, verify_sizes
    from trainer.errors import CheckpointError

    row = f"{checkpoint.step:>8}"
    try:
        manifest = read_manifest(storage, checkpoint.url)
        size = sum(entry.size for entry in manifest.files.values()) / 1e6
        row += f" {size:>9,.1f} {len(manifest.files):>6} {manifest.world_size:>6} {manifest.zero_stage:>5}"
        verify_sizes(storage, checkpoint.url)
        if every_byte:
            _verify_bytes(storage, checkpoint.url)
    except CheckpointError as error:
        say(f"{row}  damaged: {error}")
        return False
    kept_for = pins(storage, checkpoint.url)
    state = "every byte verified" if every_byte else "whole"
    say(f"{row}  {', kept for '.join([state, *kept_for])}")
    return True


def _verify_bytes(storage: Storage, url: str) -> None:
    """Read all files, one at a time, and compare checksums. Raises CheckpointError for the first that differs."""
    import tempfile
    from pathlib import Path

    from cluster.progress import Progress
    from trainer.checkpoint_folder import fetch, read_manifest

    manifest = read_manifest(storage, url)
    with Progress(f"verifying step {manifest.step}", len(manifest.files), "files") as progress:
        for path in manifest.files:
            with tempfile.TemporaryDirectory(prefix="m2f-verify-") as folder:
                fetch(storage, url, [path], manifest, Path(folder))
            progress.advance(1)
