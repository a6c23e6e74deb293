"""Go on from the newest checkpoint that is whole."""

from __future__ import annotations

import tempfile
from pathlib import Path

from data_pipeline.errors import StorageError
from data_pipeline.storage import Storage
from trainer.checkpoint_folder import ENGINE, STATE, Manifest, fetch, rng_path, verify_sizes
from trainer.control import Ranks
from trainer.engine import Engine
from trainer.errors import CheckpointError
from trainer.random_state import load_random_state
from trainer.reporting import CommittedCheckpoint, Reporter
from trainer.state import TrainState


def restore(
    engine: Engine,
    candidates: tuple[CommittedCheckpoint, ...],
    expected: TrainState,
    storage: Storage,
    ranks: Ranks,
    reporter: Reporter,
) -> tuple[CommittedCheckpoint, TrainState]:
    """Load the first of `candidates` (newest first) that is undamaged on every rank. A collective.

    Weights, optimizer and random states are then bit-equal to those at the save. `expected` is the state of a fresh
    start of this run, which the checkpoint must fit. Raises CheckpointError where it does not, or where all candidates
    are damaged.
    """
    problems = []
    for checkpoint in candidates:
        with tempfile.TemporaryDirectory(prefix="m2f-resume-") as name:
            problem = _download(checkpoint.url, expected, storage, ranks, Path(name))
            if problem is None:
                state = _read_state(Path(name), checkpoint.url)
                engine.load(Path(name), ENGINE)
                load_random_state(Path(name) / rng_path(ranks.rank))
                return checkpoint, state
        problems.append(problem)
        if ranks.is_first:
            reporter.event("damaged", checkpoint.step, f"{problem}; trying the one before")
    raise CheckpointError(
        f"none of the {len(candidates)} checkpoints can be used: {'; '.join(problems)}; repair one, or start again "
        "under another run name"
    )


def _download(url: str, expected: TrainState, storage: Storage, ranks: Ranks, folder: Path) -> str | None:
    """Bring this rank's files to `folder`; returns what is damaged on any rank. Raises where the run does not fit."""
    manifest = ranks.from_first(lambda: _verified(storage, url))
    if isinstance(manifest, str):
        return manifest
    problem = _fetched(storage, url, [STATE], manifest, folder)
    if problem is None:
        check_fits(_read_state(folder, url), expected, url)
        problem = _fetched(storage, url, _files_of_rank(manifest, ranks.rank), manifest, folder)
    return next((found for found in ranks.gather(problem) if found), None)


def _verified(storage: Storage, url: str) -> Manifest | str:
    try:
        return verify_sizes(storage, url)
    except (CheckpointError, StorageError) as error:
        return str(error)


def _fetched(storage: Storage, url: str, paths: list[str], manifest: Manifest, folder: Path) -> str | None:
    try:
        fetch(storage, url, paths, manifest, folder)
    except CheckpointError as error:
        return str(error)
    return None


def _files_of_rank(manifest: Manifest, rank: int) -> list[str]:
    """The module's weights (one file for all ranks below ZeRO-3), this rank's partition and its random states."""
    prefix = f"{ENGINE}/zero_pp_rank_{rank}_"
    shared = f"{ENGINE}/mp_rank_00_"
    return [path for path in manifest.files if path.startswith((prefix, shared))] + [rng_path(rank)]


def _read_state(folder: Path, url: str) -> TrainState:
    return TrainState.from_json((folder / STATE).read_bytes(), f"{url}/{STATE}")


def check_fits(state: TrainState, expected: TrainState, url: str) -> None:
    """Raise CheckpointError where the checkpoint `url` with this state is not one that `expected` can go on from."""
    if state.world_size != expected.world_size:
        raise CheckpointError(
            f"checkpoint {url} was written by {state.world_size} ranks and this run has {expected.world_size}; "
            f"start it with {state.world_size} ranks"
        )
    if state.zero_stage != expected.zero_stage:
        raise CheckpointError(
            f"checkpoint {url} was written with training.zero.stage {state.zero_stage} and this run has "
            f"{expected.zero_stage}; set it back, or start a new run from its weights"
        )
    if state.order_fingerprint != expected.order_fingerprint:
        raise CheckpointError(
            f"checkpoint {url} belongs to another order of the data: the data sets, their weights, filters, the seed "
            "or data.chunk_mb, data.lanes or data.window have changed; set them back, or start a new run from its "
            "weights"
        )
