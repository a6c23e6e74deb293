"""`m2f checkpoint`: list and verify the checkpoints of a run, export their weights, and delete leftovers."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import Progress, print_err, print_out
from m2f.cluster.verbs.arguments import add_recipe
from m2f.model.errors import ConfigError

if TYPE_CHECKING:
    from m2f.data_pipeline.storage.storage import Storage
    from m2f.trainer.checkpoint.folder import CheckpointManifest
    from m2f.trainer.reporting import CommittedCheckpoint

SUMMARY = "list, verify or export the checkpoints of a run, or delete leftover files"
EXAMPLE = "m2f checkpoint ls cells.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("ls", "verify", "export", "gc"),
        help="ls: list checkpoints and check file sizes; verify: read all files and compare checksums; export: write "
        "the weights (their moving average if the run has one) to --output; gc: delete checkpoints that were never "
        "committed, are damaged or were committed too late, and incomplete files and uploads; refused during training",
    )
    add_recipe(parser)
    parser.add_argument(
        "--step", type=int, metavar="N", help="step of the only checkpoint to use (default: all; export: the newest)"
    )
    parser.add_argument("--output", metavar="PATH", help="export: file to create, NAME.safetensors")
    parser.add_argument("--dry-run", action="store_true", help="gc: list files without deleting them")
    parser.add_argument(
        "--no-average", action="store_true", help="export: write the weights instead of their moving average"
    )


def run(args: argparse.Namespace) -> int:
    """Run the action. Return exit status 1 if a listed checkpoint is damaged or of a newer version."""
    print_err(f"{args.recipe}: loading PyTorch")
    from m2f.cluster.predict.choose_checkpoint import choose_checkpoint, open_recipe
    from m2f.data_pipeline.storage.storage import Storage
    from m2f.trainer.checkpoint.folder import list_checkpoints
    from m2f.trainer.reporting import CommittedCheckpoint

    config, _ = open_recipe(args.recipe, args.overrides)
    storage = Storage(config.storage)
    if args.action == "gc":
        return _delete_leftovers(storage, config.run_folder, args.dry_run)
    chosen = choose_checkpoint(config, storage, None if args.step is None else str(args.step))
    if args.action == "export":
        return _export(storage, chosen.url, args.output, averaged=not args.no_average)
    if args.step is None:
        checkpoints = list_checkpoints(storage, config.run_folder)
    else:
        checkpoints = (CommittedCheckpoint(args.step, chosen.url),)
    print_out(f"{'step':>8} {'MB':>9} {'files':>6} {'ranks':>6} {'ZeRO':>5}  state")
    verifies = args.action == "verify"
    are_valid = [_print_state(storage, checkpoint, reads_all_bytes=verifies) for checkpoint in checkpoints]
    return ExitStatus.DONE if all(are_valid) else ExitStatus.FAILED


def _delete_leftovers(storage: Storage, run_folder: str, dry_run: bool) -> int:
    """Print files that are no longer needed, and delete them under the lease of the run folder unless `dry_run`."""
    from m2f.trainer.checkpoint.lease import hold_lease
    from m2f.trainer.checkpoint.lease_record import newest_number
    from m2f.trainer.checkpoint.leftovers import find_leftovers, lease_in_use

    if not storage.list(run_folder):
        raise ConfigError(f"{run_folder} is empty or does not exist; give the recipe or folder of a run")
    if dry_run:
        oldest_lease_in_use = lease_in_use(storage, run_folder)
        is_only_writer = oldest_lease_in_use > newest_number(storage, run_folder)
        if not is_only_writer:
            print_err(f"{run_folder}: a process may be training here; files that it is writing are not listed")
        leftovers = find_leftovers(storage, run_folder, oldest_lease_in_use, is_only_writer=is_only_writer)
        print_out("\n".join([*leftovers.describe(), f"{len(leftovers)} to delete; nothing was changed"]))
        return ExitStatus.DONE
    with hold_lease(storage, run_folder, print_err) as lease:
        leftovers = find_leftovers(storage, run_folder, lease.number, is_only_writer=True)
        for line in leftovers.describe():
            print_out(line)
        leftovers.delete(storage, lease.check)
    print_out(f"{len(leftovers)} deleted")
    return ExitStatus.DONE


def _export(storage: Storage, url: str, output: str | None, averaged: bool) -> int:
    """Verify the checksums of a checkpoint's weights and write all of them to the file `output`.

    With `averaged`, the moving average is written if the checkpoint has one.
    """
    from pathlib import Path

    from m2f.data_pipeline.storage.scratch import ScratchFolder
    from m2f.trainer.checkpoint.folder import AVERAGE, WEIGHTS, fetch, read_manifest
    from m2f.trainer.checkpoint.frozen import join_frozen

    if output is None or not output.endswith(".safetensors") or Path(output).exists():
        raise ConfigError(f"--output is {output}; give the name of a new file that ends in .safetensors")
    manifest = read_manifest(storage, url)
    name = AVERAGE if averaged and AVERAGE in manifest.files else WEIGHTS
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    with ScratchFolder("export", parent=str(target.parent)) as folder:
        fetch(storage, url, [path for path in manifest.files if path in (name, manifest.frozen)], manifest, folder)
        if manifest.frozen is not None:
            join_frozen(folder / name)
        (folder / name).rename(target)
    print_out(f"{output}: {name} of {url}, {target.stat().st_size / 1e6:,.1f} MB")
    return ExitStatus.DONE


def _print_state(storage: Storage, checkpoint: CommittedCheckpoint, reads_all_bytes: bool) -> bool:
    """Print the row of a checkpoint, and return whether it is complete and readable."""
    from m2f.trainer.checkpoint.folder import pins, read_manifest, verify_sizes
    from m2f.trainer.errors import CheckpointError, NewerFormatError

    row = f"{checkpoint.step:>8}"
    try:
        manifest = read_manifest(storage, checkpoint.url)
        size = sum(entry.size for entry in manifest.files.values()) / 1e6
        row += f" {size:>9,.1f} {len(manifest.files):>6} {manifest.world_size:>6} {manifest.zero_stage:>5}"
        verify_sizes(storage, checkpoint.url)
        if reads_all_bytes:
            _verify_bytes(storage, checkpoint.url, manifest)
    except NewerFormatError as error:
        print_out(f"{row}  written by a newer version: {error}")
        return False
    except CheckpointError as error:
        print_out(f"{row}  damaged: {error}")
        return False
    kept_for = pins(storage, checkpoint.url)
    state = "every byte verified" if reads_all_bytes else "complete"
    print_out(f"{row}  {', kept for '.join([state, *kept_for])}")
    return True


def _verify_bytes(storage: Storage, url: str, manifest: CheckpointManifest) -> None:
    """Read all files one at a time and compare checksums. Raises CheckpointError for the first file that differs."""
    from m2f.data_pipeline.storage.scratch import ScratchFolder
    from m2f.trainer.checkpoint.folder import fetch

    with Progress(f"verifying step {manifest.step}", len(manifest.files), "files") as progress:
        for path in manifest.files:
            with ScratchFolder("verify") as folder:
                fetch(storage, url, [path], manifest, folder)
            progress.advance(1)
