"""One rank of a test: `python rank_main.py SCENARIO FOLDER` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.

Scenarios write what they saw to FOLDER as `SCENARIO.rank_R.json`; test functions look at it. Not a test module.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import nan
from pathlib import Path

import torch
import torch.distributed as dist
from compiled_ranks import stopped_and_resumed, whole_and_in_16_bits
from engine_ranks import agreement, one_rank
from family_ranks import family_agreement

import m2f.trainer.engine.module
import m2f.trainer.loop
from m2f.data_pipeline.config import DataConfig, LargeScaleJitter, MixtureItem
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.config import (
    LossConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    TimmBackboneConfig,
)
from m2f.model.errors import UserError
from m2f.trainer.checkpoint.folder import checkpoint_url, metrics_on_their_way
from m2f.trainer.config import (
    CheckpointConfig,
    MultiStepSchedule,
    OptimizerConfig,
    PolySchedule,
    TrainingConfig,
    ZeroConfig,
)
from m2f.trainer.job import ManualControl, TrainJob
from m2f.trainer.worker import process_group, run_worker

MODEL = ModelConfig(
    backbone=TimmBackboneConfig(name="resnet10t", norm="group", options={"channels": (8, 16, 24, 32)}),
    pixel_decoder=MSDeformAttnPixelDecoderConfig(
        conv_dim=16, mask_dim=16, num_layers=1, num_heads=2, num_points=2, feedforward_dim=16
    ),
    transformer_decoder=MaskedTransformerDecoderConfig(
        num_queries=8, num_layers=2, hidden_dim=16, num_heads=2, feedforward_dim=16
    ),
    loss=LossConfig(num_points=64),
    num_classes=10,
)


def make_job(run_folder: Path, shards: str, **training) -> TrainJob:
    settings = {
        "max_steps": 8,
        "global_batch": 4,
        "micro_batch": 2,
        "log_every_steps": 1,
        "optimizer": OptimizerConfig(lr=1e-3),
        "schedule": PolySchedule(),
        "checkpoint": CheckpointConfig(every_steps=3, keep=2),
        "collective_timeout_s": 60.0,
        **training,
    }
    return TrainJob(
        run_folder=str(run_folder),
        model=MODEL,
        data=DataConfig(train=(MixtureItem(dataset="train"),), augment=LargeScaleJitter(size=64), workers=0),
        shards=(shards,),
        training=TrainingConfig(**settings),
        seed=3,
        recipe="name: test\n",
    )


@dataclass
class Recorder:
    """Reporter that remembers everything."""

    losses: dict[int, float] = field(default_factory=dict)
    requests: float = 0.0
    checkpoints: list[int] = field(default_factory=list)
    events: list[tuple[str, int, str]] = field(default_factory=list)

    def metrics(self, step, values):
        self.losses[step] = values["loss/total"]
        self.requests += values["storage/requests"]

    def rank_metrics(self, step, values):
        pass

    def checkpoint(self, checkpoint):
        self.checkpoints.append(checkpoint.step)

    def event(self, kind, step, message):
        self.events.append((kind, step, message))


@dataclass
class DieAfterFirstCheckpoint(Recorder):
    """Kills this process when it hears of a commit."""

    def checkpoint(self, checkpoint):
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Diary(Recorder):
    """Writes events down at once."""

    path: Path = Path()

    def event(self, kind, step, message):
        with self.path.open("a") as file:
            file.write(json.dumps((kind, step, message)) + "\n")


def engine_agreement(folder: Path) -> dict:
    return agreement(lambda **training: make_job(folder / "none", "none", **training))


def engine_alone(folder: Path) -> dict:
    return one_rank(lambda **training: make_job(folder / "none", "none", **training))


def family(folder: Path) -> dict:
    return family_agreement(lambda **training: make_job(folder / "none", "none", **training))


def compiled(folder: Path, backend: str = "aot_eager", steps: int = 8) -> dict:
    """Graphs are captured and differentiated as for kernels, which takes seconds; kernels take minutes."""
    return stopped_and_resumed(in_folder(folder / "compiled"), _train, StopAt, backend, steps)


def compiled_by_inductor(folder: Path) -> dict:
    """The same with kernels, and more of it."""
    more = whole_and_in_16_bits(in_folder(folder / "compiled"), _train, "inductor", steps=20)
    return compiled(folder, "inductor", steps=20) | more


def in_folder(folder: Path):
    return lambda name, **training: make_job(folder / name, str(folder.parent / "shards"), **training)


def uninterrupted(folder: Path) -> dict:
    return _train(make_job(folder / "uninterrupted", str(folder / "shards")))


def killed(folder: Path) -> dict:
    reporter = DieAfterFirstCheckpoint() if os.environ["RANK"] == "1" else Recorder()
    return _train(make_job(folder / "killed", str(folder / "shards")), reporter)


def stalled(folder: Path) -> dict:
    """Rank 1 falls asleep before the third step."""
    real, calls = m2f.trainer.loop.count_normalizers, 0

    def fall_asleep(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3 and os.environ["RANK"] == "1":
            time.sleep(600)
        return real(*arguments)

    m2f.trainer.loop.count_normalizers = fall_asleep
    job = make_job(folder / "stalled", str(folder / "shards"), stall_timeout_s=2.0)
    return _train(job, Diary(path=folder / "stalled.events"))


def resumed(folder: Path) -> dict:
    return _train(make_job(folder / "killed", str(folder / "shards")))


def drained_then_damaged(folder: Path) -> dict:
    """A drain before the fifth step, then a start that finds the newest checkpoint cut off."""
    job = make_job(folder / "drained", str(folder / "shards"))
    drained = _train(job, control=DrainAt(polls=5))
    kept = {f"{step}": metrics_on_their_way(Storage(), checkpoint_url(job.run_folder, step)) for step in (3, 4)}
    if os.environ["RANK"] == "0":
        states = next((folder / "drained/checkpoints/step_00000004/engine").glob("*optim_states.pt"))
        states.write_bytes(states.read_bytes()[:-1])
    dist.barrier()
    return {"drained": drained, "kept": kept, "resumed": _train(job)}


def poisoned(folder: Path) -> dict:
    """The image at position 9 of the order (third step) makes the features non-finite."""
    shards = str(folder / "shards")
    stages = {
        f"stage{stage}": make_job(folder / f"poisoned{stage}", shards, max_steps=3, zero=ZeroConfig(stage=stage))
        for stage in (0, 1, 3)
    }
    given_up = make_job(folder / "given_up", shards, max_steps=3, max_skipped_steps=0)
    with poisoned_position(9):
        return {name: _train(job) for name, job in stages.items()} | {"given_up": _train(given_up)}


def resumed_in_stages(folder: Path) -> dict:
    """Six steps at once in every stage, and the first three of them as one and two with a stop between."""
    seen = {}
    for stage in range(4):
        parts = in_stage(folder, "parts", stage, max_steps=3)
        seen[f"stage{stage}"] = {
            "whole": _train(in_stage(folder, "whole", stage, max_steps=6)),
            "stopped": _train(parts, control=StopAt(polls=2)),
            "resumed": _train(parts),
        }
        averages = [folder / f"{name}{stage}/checkpoints/step_00000003/ema.safetensors" for name in ("whole", "parts")]
        seen[f"stage{stage}"]["same_average"] = averages[0].read_bytes() == averages[1].read_bytes()
    return seen


def resumed_in_bf16(folder: Path) -> dict:
    """The same with weights of 16 bits."""
    whole, parts = in_bf16(folder, "whole", max_steps=4), in_bf16(folder, "parts", max_steps=3)
    return {"whole": _train(whole), "stopped": _train(parts, control=StopAt(polls=2)), "resumed": _train(parts)}


def in_bf16(folder: Path, name: str, max_steps: int) -> TrainJob:
    job = in_stage(folder, f"{name}_bf16_", stage=2, max_steps=max_steps)
    return replace(job, training=replace(job.training, precision="bf16"))


def with_one_rank(folder: Path) -> dict:
    """Further steps of the runs of `resumed_in_stages` and `resumed_in_bf16`."""
    stages = {f"stage{stage}": _train(in_stage(folder, "parts", stage, max_steps=5)) for stage in range(4)}
    return stages | {"bf16": _train(in_bf16(folder, "parts", max_steps=4))}


def with_two_ranks_again(folder: Path) -> dict:
    """And the sixth step."""
    return {f"stage{stage}": _train(in_stage(folder, "parts", stage, max_steps=6)) for stage in range(4)}


def in_stage(folder: Path, name: str, stage: int, max_steps: int) -> TrainJob:
    return make_job(
        folder / f"{name}{stage}",
        str(folder / "shards"),
        max_steps=max_steps,
        schedule=MultiStepSchedule(milestones=()),  # the same rates whatever max_steps is
        zero=ZeroConfig(stage=stage, param_persistence_threshold=0),
        ema_decay=0.9,
    )


def unreadable(folder: Path) -> dict:
    """A shard whose bytes changed after it was written: only the rank that meets the sample notices."""
    return _train(make_job(folder / "unreadable", str(folder / "damaged_shards")))


def misfits(folder: Path) -> dict:
    """Resuming `uninterrupted` with a seed that does not fit its checkpoints."""
    return {"seed": _train(replace(make_job(folder / "uninterrupted", str(folder / "shards")), seed=4))}


def other_stages(folder: Path) -> dict:
    """Three steps with ZeRO 1, two more with ZeRO 3, the last without ZeRO."""
    jobs = [in_stage(folder, "crossed", stage, steps) for stage, steps in ((1, 3), (3, 5), (0, 6))]
    return {f"to {job.training.max_steps}": _train(replace(job, run_folder=jobs[0].run_folder)) for job in jobs}


def bad_samples(folder: Path) -> dict:
    """The same shards where a bad sample may be replaced."""
    job = make_job(folder / "bad_samples", str(folder / "damaged_shards"))
    return _train(replace(job, data=replace(job.data, max_bad_samples=1)))


def augmented_on_device(folder: Path) -> dict:
    """Two steps whose images are augmented where the model computes."""
    job = make_job(folder / "augmented", str(folder / "shards"), max_steps=2)
    return _train(replace(job, data=replace(job.data, augment_on="device")))


def changed_data(folder: Path) -> dict:
    """Three steps, then another selection of the images: with and without leave to go on."""
    job = make_job(folder / "changed", str(folder / "shards"), max_steps=3)
    before = _train(job)
    data = replace(job.data, train=(MixtureItem(dataset="train", fraction=0.5),))
    longer = replace(job, training=replace(job.training, max_steps=6), data=data)
    refused = _train(longer)
    accepted = _train(replace(longer, data=replace(data, accept_changes=True)))
    return {"before": before, "refused": refused, "accepted": accepted}


@dataclass
class DrainAt(ManualControl):
    """Metrics of the first two steps arrive, later ones do not."""

    polls: int = 0

    def drain_requested(self) -> bool:
        self.polls -= 1
        return self.polls <= 0

    def metrics_arrived(self, step: int) -> bool:
        return step <= 2


@dataclass
class StopAt(ManualControl):
    polls: int = 0

    def stop_requested(self) -> bool:
        self.polls -= 1
        return self.polls <= 0


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


def _train(job: TrainJob, reporter: Recorder | None = None, control: ManualControl | None = None) -> dict:
    reporter = reporter or Recorder()
    try:
        state = run_worker(job, reporter, control)
    except UserError as error:
        return {**asdict(reporter), "error": f"{type(error).__name__}: {error}"}
    return {**asdict(reporter), "state": asdict(state)}


def main() -> None:
    scenarios, folder = sys.argv[1].split(","), Path(sys.argv[2])
    with process_group(torch.device("cpu"), 60.0):
        for name in scenarios:
            seen = globals()[name](folder)
            (folder / f"{name}.rank_{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
