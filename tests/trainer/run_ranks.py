"""Scenarios of test_runs.py and test_watchdog.py: complete runs, mostly on two ranks. Not a test module.

Each scenario uses its own run folders, so that its failure affects no other scenario. The few scenarios that continue
the run of another one name it in their docstrings.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import replace
from math import nan
from pathlib import Path

import torch
import torch.distributed as dist

import m2f.trainer.engine.module
import m2f.trainer.loop
from m2f.data_pipeline.config import MixtureItem
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.config import PilotConfig
from m2f.trainer.checkpoint.commits import list_commits, read_metrics
from m2f.trainer.config import MultiStepSchedule, ZeroConfig
from m2f.trainer.job import TrainJob
from m2f.trainer.recovery.ending import read_ending
from m2f.trainer.telemetry.watchdog import Watchdog
from tests.trainer.tiny_job import (
    DrainAt,
    KillAfterFirstCheckpoint,
    NoticeFileWriter,
    Recorder,
    StopAt,
    make_job,
    train,
)
from tests.waiting import PATIENCE_S

PILOTS = PilotConfig(max_targets=3, label_noise=0.5, mask_noise=0.2)
"""Fewer pilots than an image has targets, so that a hash selects the targets."""


def uninterrupted(folder: Path) -> dict:
    return train(make_job(folder / "uninterrupted", str(folder / "shards")))


def killed(folder: Path) -> dict:
    reporter = KillAfterFirstCheckpoint() if os.environ["RANK"] == "1" else Recorder()
    return train(make_job(folder / "killed", str(folder / "shards")), reporter)


def stalled(folder: Path) -> dict:
    """Rank 1 sleeps in the data phase of the third step. Slow steps before it are no stall."""
    real, calls = m2f.trainer.loop.count_normalizers, 0
    real_limit_s = Watchdog._phase_limit_s

    def fall_asleep(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3 and os.environ["RANK"] == "1":
            time.sleep(600)
        return real(*arguments)

    def limit_s(watchdog, phase):
        return real_limit_s(watchdog, phase) if calls == 3 else PATIENCE_S

    m2f.trainer.loop.count_normalizers = fall_asleep
    Watchdog._phase_limit_s = limit_s
    job = make_job(folder / "stalled", str(folder / "shards"), stall_timeout_s=10.0)
    return train(job, NoticeFileWriter(path=folder / "stalled.events"))


def resumed(folder: Path) -> dict:
    """Resume the run of `killed`."""
    return train(make_job(folder / "killed", str(folder / "shards")))


def drained_then_damaged(folder: Path) -> dict:
    """Drain before the fifth step, then resume after the newest checkpoint was truncated."""
    job = replace(make_job(folder / "drained", str(folder / "shards")), attempt="first")
    drained = train(job, control=DrainAt(polls=5))
    kept = [points for _, points in read_metrics(Storage(), job.run_folder)]
    commits = [commit.checkpoint.step for commit in list_commits(Storage(), job.run_folder)]
    ending = read_ending(Storage(), job.run_folder, job.attempt)
    dist.barrier()
    if os.environ["RANK"] == "0":
        states = next((folder / "drained/checkpoints/step_00000004/engine").glob("*optim_states.pt"))
        states.write_bytes(states.read_bytes()[:-1])
    dist.barrier()
    resumed = train(job)
    listed = [commit.checkpoint.step for commit in list_commits(Storage(), job.run_folder)]
    return {
        "drained": drained,
        "kept": kept,
        "commits": [commits, listed],
        "ending": ending and ending.kind,
        "resumed": resumed,
    }


def poisoned(folder: Path, stage: str) -> dict:
    """The image at position 9 of the data order, in the third step, gets NaN mask features."""
    zero = ZeroConfig(stage=int(stage))
    with poisoned_position(9):
        return train(make_job(folder / f"poisoned{stage}", str(folder / "shards"), max_steps=3, zero=zero))


def given_up(folder: Path) -> dict:
    """Like `poisoned` with ZeRO 1, but no step may be skipped."""
    with poisoned_position(9):
        return train(make_job(folder / "given_up", str(folder / "shards"), max_steps=3, max_skipped_steps=0))


def resumed_in_stage(folder: Path, stage: str) -> dict:
    """Train six steps without a stop, and the first three in another run that stops after one step and resumes."""
    parts = in_stage(folder, "parts", stage, max_steps=3)
    seen = {
        "whole": train(in_stage(folder, "whole", stage, max_steps=6)),
        "stopped": train(parts, control=StopAt(polls=2)),
        "resumed": train(parts),
    }
    averages = [folder / f"{name}{stage}/checkpoints/step_00000003/ema.safetensors" for name in ("whole", "parts")]
    return seen | {"same_average": averages[0].read_bytes() == averages[1].read_bytes()}


def seeded(folder: Path, max_steps: str) -> int:
    """Start or resume a run, and return the seed of this rank's generator after its last step."""
    seen = train(make_job(folder / "seeded", str(folder / "shards"), max_steps=int(max_steps)))
    assert seen["state"]["step"] == int(max_steps)
    return torch.initial_seed()


def in_stage_again(folder: Path, stage: str, max_steps: str) -> dict:
    """Continue the second run of `resumed_in_stage`."""
    return train(in_stage(folder, "parts", stage, int(max_steps)))


def resumed_in_precision(folder: Path, precision: str) -> dict:
    """Train four steps without a stop in this precision, and the first three with a stop after one step."""
    whole, parts = (in_precision(folder, name, precision, steps) for name, steps in (("whole", 4), ("parts", 3)))
    return {"whole": train(whole), "stopped": train(parts, control=StopAt(polls=2)), "resumed": train(parts)}


def in_precision_again(folder: Path, precision: str) -> dict:
    """Train one more step of the second run of `resumed_in_precision`."""
    return train(in_precision(folder, "parts", precision, max_steps=4))


def in_precision(folder: Path, name: str, precision: str, max_steps: int) -> TrainJob:
    """Return a job without box points: their weights are discontinuous, so 16-bit rounding can change them abruptly."""
    job = in_stage(folder, f"{name}_{precision}_", stage="2", max_steps=max_steps)
    loss = replace(job.model.loss, matching_box_share=0.0, supervision_box_share=0.0)
    return replace(job, model=replace(job.model, loss=loss), training=replace(job.training, precision=precision))


def in_stage(folder: Path, name: str, stage: str, max_steps: int) -> TrainJob:
    """Return a job in this ZeRO stage.

    Stage 2 uses box points and stages 1 and 3 use pilots, so that resuming and changing the number of ranks test both.
    """
    job = make_job(
        folder / f"{name}{stage}",
        str(folder / "shards"),
        max_steps=max_steps,
        schedule=MultiStepSchedule(milestones=()),  # learning rates do not depend on max_steps
        zero=ZeroConfig(stage=int(stage), param_persistence_threshold=0),
        ema_decay=0.9,
    )
    share = 0.5 if stage == "2" else 0.0
    loss = replace(job.model.loss, matching_box_share=share, supervision_box_share=share)
    pilots = PILOTS if stage in "13" else PilotConfig()
    return replace(job, model=replace(job.model, loss=loss, pilots=pilots))


def unreadable(folder: Path) -> dict:
    """Train on a corrupted shard; only the rank that reads the damaged sample detects it."""
    return train(make_job(folder / "unreadable", str(folder / "damaged_shards")))


def misfits(folder: Path) -> dict:
    """Resume a run with another seed, which contradicts its checkpoints."""
    job = make_job(folder / "misfits", str(folder / "shards"), max_steps=3)
    return {"first": train(job), "seed": train(replace(job, seed=4))}


def other_stages(folder: Path) -> dict:
    """Train three steps with ZeRO 1, two with ZeRO 3 and one without ZeRO; in another run, four steps with ZeRO 1."""
    jobs = [in_stage(folder, "crossed", stage, steps) for stage, steps in (("1", 3), ("3", 5), ("0", 6))]
    whole = train(in_stage(folder, "not_crossed", "1", max_steps=4))
    crossed = [train(replace(job, run_folder=jobs[0].run_folder)) for job in jobs]
    return {"whole": whole, "to 3": crossed[0], "to 5": crossed[1], "to 6": crossed[2]}


def bad_samples(folder: Path) -> dict:
    """Train on the shards of `unreadable` with one bad sample allowed, which is replaced."""
    job = make_job(folder / "bad_samples", str(folder / "damaged_shards"))
    return train(replace(job, data=replace(job.data, max_bad_samples=1)))


def changed_data(folder: Path) -> dict:
    """Train three steps, then resume with a different selection of images, without and with `accept_changes`."""
    job = make_job(folder / "changed", str(folder / "shards"), max_steps=3)
    before = train(job)
    data = replace(job.data, train=(MixtureItem(dataset="train", fraction=0.5),))
    longer = replace(job, training=replace(job.training, max_steps=6), data=data)
    refused = train(longer)
    accepted = train(replace(longer, data=replace(data, accept_changes=True)))
    return {"before": before, "refused": refused, "accepted": accepted}


@contextmanager
def poisoned_position(position: int):
    real = m2f.trainer.engine.module.compute_losses

    def poisoned(predictions, targets, *rest):
        bad = (targets.position == position)[:, None, None, None]
        return real(predictions._replace(mask_features=predictions.mask_features.masked_fill(bad, nan)), targets, *rest)

    m2f.trainer.engine.module.compute_losses = poisoned
    try:
        yield
    finally:
        m2f.trainer.engine.module.compute_losses = real
