"""Scenarios of test_safe_load.py: load what DeepSpeed saved and record every call of torch.load. Not a test module."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from m2f.data_pipeline.order.order import step_positions
from m2f.trainer.config import ZeroConfig
from m2f.trainer.engine.engine import Engine, deepspeed_config, to_universal
from m2f.trainer.job import TrainJob
from m2f.trainer.ranks import Ranks
from tests.trainer.engine_ranks import BASE, GLOBAL_BATCH, fresh_module, make_images, normalizers_of
from tests.trainer.tiny_job import make_job, train
from tests.waiting import PATIENCE_S

_CPU = "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator"
_ENGINE = "m2f.trainer.engine.engine"


def restored(folder: Path, precision: str, stage: str, offload: str) -> dict:
    """Compare a third step after two steps and a save: by the saving engine and by engines that loaded the save.

    One of the loading engines, except in stage 0, reads the universal format.
    """
    zero = ZeroConfig(stage=int(stage), offload_optimizer=offload == "offload", param_persistence_threshold=0)
    job = make_job(Path("none"), "none", **(BASE | {"precision": precision, "zero": zero}))
    place, ranks = folder / f"restored_{precision}_{stage}_{offload}", Ranks(PATIENCE_S)
    seen = {"loads": [], "equal": [], "globals": []}
    with _fp16_on_cpu(), _recorded_loads(seen["loads"]):
        saving = _engine(job)
        for number in (0, 1):
            _step(saving, job, ranks, number)
        saving.save(place, "engine")
        dist.barrier()
        others = [_loaded(job, place, "engine")]
        if zero.stage:
            ranks.run_on_rank0(lambda: to_universal(place / "engine", place / "universal"))
            others.append(_loaded(job, place, "universal", universal=True))
        for engine in (saving, *others):
            _step(engine, job, ranks, 2)
        expected = saving.weights()
        for engine in others:
            weights = engine.weights()
            seen["equal"].append(all(torch.equal(weights[name], value) for name, value in expected.items()))
    for path in sorted((place / "engine").glob("*.pt")):
        seen["globals"] += torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return seen


def saved(folder: Path) -> dict:
    """Train the two-rank run that `attacked` resumes."""
    return train(make_job(folder / "saved", str(folder / "shards"), max_steps=3))


def attacked(folder: Path, path: str, attack: str, ranks: str = "two") -> dict:
    """Resume the run of `saved` after an attack on its checkpoint files; the manifest has their new checksums.

    `path` is the start of the files' paths, with `.` for `/`. `ranks` only makes the scenario's name unique.
    """
    run, loads = folder / f"attacked_{path}_{attack}_{ranks}", []
    if dist.get_rank() == 0:
        shutil.copytree(folder / "saved", run)
        for file in sorted(next((run / "checkpoints").iterdir()).glob(path.replace(".", "/") + "*.pt")):
            _tamper(file, attack, folder / "EXECUTED")
    dist.barrier()
    with _recorded_loads(loads):
        seen = train(make_job(run, str(folder / "shards"), max_steps=4))
    return seen | {"loads": loads}


class Command:
    """Object whose unpickling runs a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def _tamper(file: Path, attack: str, marker: Path) -> None:
    content = torch.load(file, weights_only=False)
    if attack == "command":
        content["more"] = Command(f"touch {marker}")
    elif attack == "name":
        content["../../../EXECUTED"] = content.pop("optimizer_state_dict", 0)
    torch.save(content, file)
    manifest = file.parents[1] / "manifest.json"
    document, data = json.loads(manifest.read_bytes()), file.read_bytes()
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    document["files"][f"{file.parent.name}/{file.name}"] = entry
    manifest.write_text(json.dumps(document))


@contextmanager
def _recorded_loads(loads: list[str]) -> Iterator[None]:
    """Append `weights_only` of every call that reaches the original torch.load to `loads`."""
    load = torch.load

    def recording_load(*arguments, **options):
        loads.append(str(options.get("weights_only")))
        return load(*arguments, **options)

    with patch.object(torch, "load", recording_load):
        yield


@contextmanager
def _fp16_on_cpu() -> Iterator[None]:
    """Allow pure fp16 on a CPU, with an initial loss scale that does not overflow."""

    def config(training, world_size, universal=False):
        settings = deepspeed_config(training, world_size, universal)
        if training.precision == "fp16":
            settings["fp16"]["initial_scale_power"] = 4
        return settings

    with ExitStack() as stack:
        stack.enter_context(patch(f"{_ENGINE}.check_device"))
        stack.enter_context(patch(f"{_ENGINE}.deepspeed_config", config))
        stack.enter_context(patch(f"{_CPU}.is_fp16_supported", lambda _: True))
        yield


def _engine(job: TrainJob, universal: bool = False) -> Engine:
    module = fresh_module(job, job.training.precision)
    if module.loss_scale is not None:
        module.loss_scale.scale = 16.0
    return Engine(module, job.training, torch.device("cpu"), universal)


def _loaded(job: TrainJob, place: Path, tag: str, universal: bool = False) -> Engine:
    engine = _engine(job, universal)
    engine.load(place, tag)
    return engine


def _step(engine: Engine, job: TrainJob, ranks: Ranks, number: int) -> None:
    plan = step_positions(number, GLOBAL_BATCH, ranks.rank, ranks.world_size, job.training.micro_batch)
    batches = [make_images(job.model, positions) for positions in plan]
    normalizers = normalizers_of(job, batches, ranks)
    for batch in batches:
        engine.accumulate(batch, normalizers)
    assert engine.finish_step(number + 1).applied
