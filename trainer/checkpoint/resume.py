"""Resume from the newest undamaged checkpoint, with the same or another number of ranks."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch

from m2f.data_pipeline.storage.scratch import ScratchFolder, report_full_disk
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.segmenter import Segmenter
from m2f.model.weights.load import load_weights
from m2f.trainer.checkpoint.commits import withdraw_commit
from m2f.trainer.checkpoint.folder import (
    AVERAGE,
    ENGINE,
    STATE,
    WEIGHTS,
    CheckpointManifest,
    fetch,
    rng_path,
    set_aside,
    verify_sizes,
)
from m2f.trainer.checkpoint.lease_record import check_lease
from m2f.trainer.checkpoint.random_state import load_random_state
from m2f.trainer.engine.engine import Engine, to_universal
from m2f.trainer.errors import CheckpointError
from m2f.trainer.job import PositionRange
from m2f.trainer.ranks import Ranks
from m2f.trainer.reporting import CommittedCheckpoint, Notice, Reporter
from m2f.trainer.state import TrainState

_UNIVERSAL = f"{ENGINE}_universal"


@dataclass(frozen=True)
class Restart:
    """A checkpoint on the local disk, verified and ready to be loaded."""

    checkpoint: CommittedCheckpoint
    state: TrainState
    """State from which the run continues, with its current number of ranks."""
    folder: Path
    same_ranks: bool
    saved_stage: int
    """ZeRO stage of the run that wrote the checkpoint."""
    frozen: str | None
    """Name of the file with the frozen weights."""

    @property
    def weights_only(self) -> bool:
        """Whether the optimizer starts without state, because ZeRO stages partition and name its state differently."""
        return self.saved_stage != self.state.zero_stage

    @property
    def reshard(self) -> bool:
        """Whether the optimizer state is repartitioned for another number of ranks; never without ZeRO."""
        return not self.same_ranks and not self.weights_only and self.state.zero_stage > 0

    def load_model(self, model: Segmenter) -> None:
        """Load what `load_engine` does not: frozen weights or, if `reshard` or `weights_only` is true, all weights.

        Call this before the engine exists. DeepSpeed's universal format lacks buffers. Raises CheckpointError if
        `model.freeze` freezes other weights than when the checkpoint was written.
        """
        if self.reshard or self.weights_only:
            load_weights(model, self.folder / WEIGHTS)
        elif self.frozen is not None:
            frozen = safetensors.torch.load_file(self.folder / self.frozen)
            now = model.frozen_names()
            if differing := [name for name in model.state_dict() if (name in now) != (name in frozen)]:
                raise CheckpointError(
                    f"checkpoint {self.checkpoint.url} is rejected: model.freeze does not freeze what {self.frozen} "
                    f"contains; they differ in {', '.join(differing[:3])} and others. Restore the setting, or start a "
                    "new run from its weights"
                )
            model.load_state_dict(frozen, strict=False)

    def load_engine(self, engine: Engine, ranks: Ranks) -> None:
        """Load weights and optimizer state, unless `weights_only`, and the moving average.

        With the same number of ranks, also load random states, so that the run continues bit-identically.
        """
        with _with_remedy(self.checkpoint.url):
            if not self.weights_only:
                engine.load(self.folder, _UNIVERSAL if self.reshard else ENGINE, self.frozen is not None)
            average = self.folder / AVERAGE
            engine.load_average(safetensors.torch.load_file(average) if average.is_file() else None)
            if self.same_ranks:
                load_random_state(self.folder / rng_path(ranks.rank))
        ranks.check()  # ranks of a machine may share the folder, which one of them deletes after this


@contextmanager
def open_restart(
    candidates: tuple[CommittedCheckpoint, ...],
    expected: TrainState,
    storage: Storage,
    ranks: Ranks,
    reporter: Reporter,
    accept_changes: bool,
    skipped: Sequence[PositionRange] = (),
    lease: int = 0,
) -> Iterator[Restart | None]:
    """Download the first of `candidates` (newest first) that is undamaged on every rank; None without candidates.

    The checkpoint must fit `expected`, the state of a fresh start; with `accept_changes` its data order may differ.
    Damaged candidates before it, and those within a `skipped` range, are set aside. Raises CheckpointError if the
    checkpoint does not fit or no candidate is usable, and StorageError if the storage does not answer. Every rank must
    call it.
    """
    problems = []
    for checkpoint in candidates:
        with ScratchFolder("resume") as folder:
            found = _download(checkpoint, expected, storage, ranks, folder, accept_changes, skipped)
            if isinstance(found, Restart):
                _set_aside(candidates[: len(problems)], storage, ranks, lease)
                if found.weights_only and ranks.is_first:
                    message = f"training.zero.stage was {found.saved_stage}: weights are kept, optimizer state is reset"
                    reporter.report(Notice("weights", checkpoint.step, message))
                yield found
                return
        problems.append(found)
        if ranks.is_first:
            reporter.report(Notice("damaged", checkpoint.step, f"{found}; trying the previous checkpoint"))
    if problems:
        raise CheckpointError(
            f"none of the {len(problems)} checkpoints can be used: {'; '.join(problems)}; repair one, or start over "
            "under another run name"
        )
    yield None


def _set_aside(damaged: tuple[CommittedCheckpoint, ...], storage: Storage, ranks: Ranks, lease: int) -> None:
    """Set damaged checkpoints aside, after an undamaged one was found, so that listings ignore them."""

    def set_all_aside() -> None:
        for checkpoint in damaged:
            check_lease(storage, checkpoint.url.rpartition("/checkpoints/")[0], lease)
            withdraw_commit(storage, checkpoint.url)
            set_aside(storage, checkpoint.url)

    ranks.run_on_rank0(set_all_aside)


def _download(
    checkpoint: CommittedCheckpoint,
    expected: TrainState,
    storage: Storage,
    ranks: Ranks,
    folder: Path,
    accept_changes: bool,
    skipped: Sequence[PositionRange],
) -> Restart | str:
    """Download this rank's files, and convert them if the ranks differ; or return what is damaged on any rank."""
    inspected = ranks.run_on_rank0(lambda: _inspect(storage, checkpoint.url, folder, skipped))
    if isinstance(inspected, str):
        return inspected
    manifest, state = inspected
    state = state.with_order(expected.order_fingerprint, checkpoint.url, accept_changes)
    same_ranks = state.world_size == ranks.world_size
    state = replace(state, world_size=ranks.world_size, zero_stage=expected.zero_stage)
    restart = Restart(checkpoint, state, folder, same_ranks, manifest.zero_stage, manifest.frozen)
    if restart.reshard:
        restart = replace(restart, folder=_machine_folder(ranks, folder))
    paths = _paths(restart, manifest, ranks.rank) if restart.folder == folder else []
    own_problem = ranks.run_on_all(lambda: _try_fetch(storage, checkpoint.url, paths, manifest, folder))
    problem = next(filter(None, ranks.gather(own_problem)), None)
    if problem is None and restart.reshard:
        ranks.run_on_all(lambda: _convert(checkpoint.url, folder) if paths else None)
    return problem or restart


def _convert(url: str, folder: Path) -> None:
    with _with_remedy(url):
        to_universal(folder / ENGINE, folder / _UNIVERSAL)


@contextmanager
def _with_remedy(url: str) -> Iterator[None]:
    """Add the checkpoint and the remedy to errors about a file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"checkpoint {url} is rejected: {error}; find out who wrote it, and delete it to resume from the "
            "previous one"
        ) from error


def _inspect(
    storage: Storage, url: str, folder: Path, skipped: Sequence[PositionRange]
) -> tuple[CheckpointManifest, TrainState] | str:
    try:
        manifest = verify_sizes(storage, url)
        with report_full_disk("files of a checkpoint"):
            fetch(storage, url, [STATE], manifest, folder)
        state = TrainState.from_json((folder / STATE).read_bytes(), f"{url}/{STATE}")
    except CheckpointError as error:
        return str(error)
    inside = next(filter(state.inside, skipped), None)
    return f"checkpoint {url} was saved during a loss spike ({inside})" if inside else (manifest, state)


def _machine_folder(ranks: Ranks, folder: Path) -> Path:
    """Return the folder of the first rank on this machine."""
    host = socket.gethostname()
    return next(path for other, path in ranks.gather((host, folder)) if other == host)


def _paths(restart: Restart, manifest: CheckpointManifest, rank: int) -> list[str]:
    """Return the files that this rank needs; when resharding, those that its machine needs."""
    model = [path for path in manifest.files if path in (AVERAGE, manifest.frozen)]
    if restart.weights_only:
        return [WEIGHTS, *model] + ([rng_path(rank)] if restart.same_ranks else [])
    if restart.reshard:
        return [path for path in manifest.files if path.startswith(f"{ENGINE}/")] + [WEIGHTS, *model]
    names = ("mp_rank_00_", f"zero_pp_rank_{rank}_", f"bf16_zero_pp_rank_{rank}_")  # the first is shared by all ranks
    own_prefixes = tuple(f"{ENGINE}/{name}" for name in names)
    engine = [path for path in manifest.files if path.startswith(own_prefixes)] + model
    return [*engine, rng_path(rank)] if restart.same_ranks else engine


def _try_fetch(storage: Storage, url: str, paths: list[str], manifest: CheckpointManifest, folder: Path) -> str | None:
    try:
        with report_full_disk("files of a checkpoint"):
            fetch(storage, url, paths, manifest, folder)
    except CheckpointError as error:
        return str(error)
    return None
