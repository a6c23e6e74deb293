"""Set up one rank before its first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch

from m2f.data_pipeline.loading.loader import StepBatches
from m2f.data_pipeline.randomness import Stream, random_words
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.attention_backends import select_attention_backends
from m2f.trainer.checkpoint.folder import list_checkpoints
from m2f.trainer.checkpoint.identity import require_own_checkpoint
from m2f.trainer.checkpoint.resume import open_restart
from m2f.trainer.checkpoint.saver import CheckpointSaver
from m2f.trainer.data import OpenData, TrainingData, open_batches
from m2f.trainer.device import require_exclusive_device, selected_device
from m2f.trainer.engine.compile import compile_regions
from m2f.trainer.engine.engine import Engine
from m2f.trainer.engine.module import TrainingModule
from m2f.trainer.job import TrainJob
from m2f.trainer.memory.probe import probe_memory
from m2f.trainer.ranks import Ranks
from m2f.trainer.reporting import CommittedCheckpoint, Notice, Reporter
from m2f.trainer.start_model import build_empty_model, start_model
from m2f.trainer.state import TrainState


@dataclass(frozen=True)
class Run:
    """Components of one rank in a run that is ready to train."""

    job: TrainJob
    ranks: Ranks
    storage: Storage
    engine: Engine
    saver: CheckpointSaver
    batches: Iterator[StepBatches]
    state: TrainState
    resumed: CommittedCheckpoint | None
    """Checkpoint from which the run resumes; None for a new run."""


@contextmanager
def open_run(job: TrainJob, reporter: Reporter, open_data: OpenData) -> Iterator[Run]:
    """Open data and model, resume from the newest undamaged checkpoint, and start the loader. Every rank calls it."""
    training = job.training
    ranks = Ranks(training.collective_timeout_s)
    device = prepare_device(ranks, reporter)
    storage = Storage(job.storage, known_reachable=True, on_wait=lambda line: _report_wait(reporter, ranks.rank, line))
    data = ranks.run_on_all(lambda: open_data(job, storage))
    ranks.run_on_rank0(lambda: data.check(storage))
    state, resumed = _initial_state(job, data, ranks), None
    candidates = ranks.run_on_rank0(lambda: list_checkpoints(storage, job.run_folder))
    start = ranks.run_on_rank0(lambda: require_own_checkpoint(storage, [c.url for c in candidates], job.identity))
    accept = job.data.accept_changes
    with open_restart(candidates, state, storage, ranks, reporter, accept, job.skipped, job.lease) as restart:
        if restart is None:
            model, start = ranks.run_on_all(lambda: start_model(job, storage, reporter if ranks.is_first else None))
        else:
            model = ranks.run_on_all(lambda: build_empty_model(job))
            restart.load_model(model)
        job = job.with_start_weights(start)
        if training.settled_compile:
            ranks.run_on_all(lambda: compile_regions(model))
        module = TrainingModule(
            model, job.model, job.seed, training.settled_precision, pixel_decoder_fp32=training.pixel_decoder_fp32
        )
        job = probe_memory(module, job, data, device, ranks, reporter)
        engine = Engine(module, job.training, device, universal=restart is not None and restart.reshard)
        _seed_dropout(job.seed, ranks.rank, state.step if restart is None else restart.state.step)
        if restart is not None:
            restart.load_engine(engine, ranks)
            state, resumed = restart.state, restart.checkpoint
    with ExitStack() as stack:
        saver = CheckpointSaver(job, storage, ranks, resumed)
        stack.enter_context(closing(saver))
        saver.check_space(engine)
        if state.order_start and state.order_start == state.position and ranks.is_first:
            message = f"changed: a new order starts at image {state.position} of the run"
            reporter.report(Notice("data", state.step, message))
        on_gpu = device.type == "cuda"
        batches = open_batches(job, data, storage, state, ranks.rank, ranks.neighbors(), pin=on_gpu)
        stack.enter_context(closing(batches))
        yield Run(job, ranks, storage, engine, saver, batches, state, resumed)


def prepare_device(ranks: Ranks, reporter: Reporter) -> torch.device:
    """Return this rank's device after selecting the attention implementations that suit it. Every rank must call it.

    Raises TrainingError on all ranks if two of them use the same GPU.
    """
    device = selected_device()
    require_exclusive_device(device, ranks)
    attention = select_attention_backends(device)
    if attention is not None and ranks.is_first:
        reporter.report(Notice("device", 0, attention))
    return device


def _seed_dropout(seed: int, rank: int, step: int) -> None:
    """Seed torch's generators, from which dropout and drop path draw, differently on every rank.

    Call this after the initial weights are drawn, because these must be equal on all ranks. If a run resumes with
    another number of ranks, the step makes its random numbers new. With the same number of ranks, the checkpoint
    restores the generators afterwards.
    """
    torch.manual_seed(random_words(seed, Stream.DROPOUT, rank, step, count=1).item())


def _report_wait(reporter: Reporter, rank: int, line: str) -> None:
    reporter.report(Notice("storage", 0, f"rank {rank} is {line}"))


def _initial_state(job: TrainJob, data: TrainingData, ranks: Ranks) -> TrainState:
    return TrainState(
        order_fingerprint=data.fingerprint,
        seed=job.seed,
        world_size=ranks.world_size,
        zero_stage=job.training.zero.stage,
    )
