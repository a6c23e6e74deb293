"""Runs scenarios as one rank; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the environment.

A scenario is `NAME` or `NAME:ARGUMENT:...`. Its result is written to `SCENARIO.rank_R.json` in the folder, where tests
read it. The first failing scenario ends the process; the launcher starts a new one for the rest. Not a test module.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from m2f.cluster.exit_status import end_process
from m2f.trainer.worker import process_group
from tests.trainer import run_ranks
from tests.trainer.ahead_ranks import ahead
from tests.trainer.annealed_ranks import annealed, annealed_again
from tests.trainer.compiled_ranks import stopped_and_resumed, whole_run_and_16_bit_runs
from tests.trainer.engine_ranks import agreement, host_syncs, one_rank, plain, poisoned
from tests.trainer.family_ranks import family_agreement
from tests.trainer.freeze_ranks import frozen, frozen_alone, frozen_damaged, frozen_old, frozen_vit
from tests.trainer.restore_ranks import attacked, restored, saved
from tests.trainer.tiny_job import StopAt, make_job, train
from tests.waiting import PATIENCE_S


def engine_plain(_: Path) -> dict:
    return plain(without_data)


def engine_agreement(_: Path, case: str) -> dict:
    return agreement(without_data, case)


def engine_alone(_: Path, case: str) -> dict:
    return one_rank(without_data, case)


def engine_waits(_: Path, case: str) -> dict:
    return host_syncs(without_data, case)


def engine_poisoned(_: Path) -> list:
    return poisoned(without_data)


def family(_: Path) -> dict:
    return family_agreement(without_data)


def compiled(folder: Path, backend: str = "aot_eager", steps: int = 8) -> dict:
    """By default, capture and differentiate graphs without generating kernels: seconds instead of minutes."""
    return stopped_and_resumed(in_folder(folder / f"compiled_by_{backend}"), train, StopAt, backend, steps)


def compiled_by_inductor(folder: Path) -> dict:
    """Run the same with Inductor's kernels and more steps; add an uninterrupted run and 16-bit runs."""
    more = whole_run_and_16_bit_runs(in_folder(folder / "compiled_by_inductor"), train, "inductor", steps=20)
    return compiled(folder, "inductor", steps=20) | more


def without_data(**training):
    return make_job(Path("none"), "none", **training)


def in_folder(folder: Path):
    return lambda name, **training: make_job(folder / name, str(folder.parent / "shards"), **training)


SCENARIOS = (
    ahead,
    annealed,
    annealed_again,
    engine_plain,
    engine_agreement,
    engine_alone,
    engine_waits,
    engine_poisoned,
    family,
    frozen,
    frozen_alone,
    frozen_damaged,
    frozen_old,
    frozen_vit,
    restored,
    saved,
    attacked,
    compiled,
    compiled_by_inductor,
)


def main(scenarios: list[str], folder: Path) -> None:
    functions = {scenario.__name__: scenario for scenario in SCENARIOS}
    with process_group(torch.device("cpu"), PATIENCE_S):
        for scenario in scenarios:
            name, *arguments = scenario.split(":")
            seen = (functions.get(name) or getattr(run_ranks, name))(folder, *arguments)
            (folder / f"{scenario}.rank_{os.environ['RANK']}.json").write_text(json.dumps(seen))
    end_process(0)
