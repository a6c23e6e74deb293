"""The training loop of one rank, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from m2f.data_pipeline.loading.loader import StepBatches
from m2f.model.loss.criterion import Losses, Normalizers, count_normalizers
from m2f.trainer.checkpoint.folder import checkpoint_url
from m2f.trainer.data import OpenData
from m2f.trainer.engine.engine import StepResult
from m2f.trainer.engine.schedule import lr_factor
from m2f.trainer.errors import LossSpikeError, OutOfMemoryError, TrainingError
from m2f.trainer.job import Control, PositionRange, TrainJob
from m2f.trainer.memory.shortage import is_out_of_memory
from m2f.trainer.observer import Observer
from m2f.trainer.ranks import StepFacts
from m2f.trainer.recovery.bad_samples import BadSamples
from m2f.trainer.recovery.ending import Ending, write_ending
from m2f.trainer.reporting import CommitReport, CommittedCheckpoint, Notice, NoticeKind, Reporter
from m2f.trainer.setup import Run, open_run
from m2f.trainer.state import TrainState
from m2f.trainer.telemetry.metrics import non_finite_keys, summed_losses
from m2f.trainer.telemetry.numbers import StepMetrics


def train(job: TrainJob, reporter: Reporter, control: Control, open_data: OpenData) -> TrainState:
    """Train until `max_steps`, or until `control` asks to end, resuming from the newest whole checkpoint of the run.

    Every rank calls this inside a process group. The returned state is checkpointed and committed. Raises
    TrainingError (on all ranks where the data or upload of one fails), CheckpointError, DataError, StorageError and
    ConfigError.
    """
    with open_run(job, reporter, open_data) as run, Observer(run, reporter) as observer:
        return _Loop(run, reporter, control, observer).run()


class _Loop:
    """What one rank does between the first step and the last checkpoint."""

    def __init__(self, run: Run, reporter: Reporter, control: Control, observer: Observer) -> None:
        self._run = run
        self._training = run.job.training
        self._reporter = reporter
        self._control = control
        self._observer = observer
        self._bad_samples = BadSamples(run.job.data.max_bad_samples, run.ranks)
        self._announced = -1
        self._uncommitted: dict[int, StepMetrics] = {}
        """Rank 0: metrics by step since the last save."""

    def run(self) -> TrainState:
        training, engine, state = self._training, self._run.engine, self._run.state
        if self._run.resumed is not None:
            self._announce(self._run.resumed)
            self._notify("resumed", state.step, f"from {self._run.resumed.url}")
        while state.step < training.max_steps:
            batches, facts = self._next_step()
            if facts.substitutions:
                self._report_substitutions(state, batches)
            if facts.stop or facts.drain:
                return self._end("stopped" if facts.stop else "drained", state)
            state = replace(state, position=batches.step * training.global_batch)  # behind what is left out
            engine.set_lr_factor(lr_factor(training.schedule, state.step, training.max_steps))
            engine.module.model.set_progress(state.step, training.max_steps)
            losses, result = self._compute(batches, facts, state)
            state = state.advance(training.global_batch, result.applied)
            self._observer.step_done(state, batches, facts.images, losses, result)
            if not result.applied:
                self._report_skip(state, batches, losses)
                continue
            state = self._look_for_spikes(state, losses)
            if state.step % training.log_every_steps == 0:
                self._report(state, losses, result)
            if state.step % training.checkpoint.every_steps == 0:
                self._save(state)
        return self._end("finished", state)

    def _next_step(self) -> tuple[StepBatches, StepFacts]:
        """This rank's batches and what all ranks said about the step. An error on any rank is raised on all."""
        batches, mine, error = None, StepFacts(), None
        self._observer.enter("data")
        try:
            batches = next(self._run.batches)
            mine = self._facts(batches)
        except Exception as caught:
            error = caught
        self._observer.enter("exchange")
        facts = self._run.ranks.exchange(mine, error)
        assert batches is not None
        if facts.committed:
            step, job = int(facts.committed), self._run.job
            self._announce(CommittedCheckpoint(step, checkpoint_url(job.run_folder, step, job.lease)))
        return batches, facts

    def _facts(self, batches: StepBatches) -> StepFacts:
        model, is_first = self._run.job.model, self._run.ranks.is_first
        counts = [
            count_normalizers(batch.targets, model.transformer_decoder.num_queries, model.loss)
            for batch in batches.micro_batches
        ]
        commit = self._run.saver.newest_commit()
        return StepFacts(
            num_masks=sum(float(count.num_masks) for count in counts),
            class_weight_sum=sum(float(count.class_weight_sum) for count in counts),
            micro_batches=sum(float(count.num_micro_batches) for count in counts),
            images=len(batches.positions),
            substitutions=len(batches.substitutions),
            stop=is_first and self._control.stop_requested(),
            drain=is_first and self._control.drain_requested(),
            committed=commit.step if is_first and commit is not None else 0,
        )

    def _compute(self, batches: StepBatches, facts: StepFacts, state: TrainState) -> tuple[list[Losses], StepResult]:
        """Forward, backward and update. Raises OutOfMemoryError on the rank whose device is too small."""
        try:
            losses = self._forward_backward(batches, facts)
            return losses, self._run.engine.finish_step(state.step + 1)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            size = len(batches.micro_batches[0].keys)
            raise OutOfMemoryError(
                f"out of memory in step {state.step + 1} with {size} images at once (training.micro_batch): {error}",
                size,
            ) from error

    def _forward_backward(self, batches: StepBatches, facts: StepFacts) -> list[Losses]:
        engine = self._run.engine
        # Filled on the device: a copy from the host would wait for all work queued before it.
        sums = (facts.num_masks, facts.class_weight_sum, facts.micro_batches)
        normalizers = Normalizers(*(torch.full((), number, device=engine.device) for number in sums))
        losses = []
        for batch in batches.micro_batches:
            self._observer.enter("forward")
            losses.append(engine.accumulate(batch.to(engine.device, non_blocking=True), normalizers))
        self._observer.enter("update")
        return losses

    def _look_for_spikes(self, state: TrainState, losses: Sequence[Losses]) -> TrainState:
        """The state with this step's loss. Where that completes a spike: an event, or LossSpikeError on all ranks."""
        config = self._training.spikes
        if config.action == "off":
            return state
        loss = summed_losses(losses, self._run.ranks).total  # a collective
        before, first = state.losses, state.position - self._training.global_batch
        state = replace(state, losses=before.after(loss, first, config))
        if state.losses.high == config.steps:
            usual, deviation = before.usual()
            positions = PositionRange(state.losses.start, state.position)
            message = f"the loss is {loss:.4g} where {usual:.4g} +- {deviation:.2g} is usual ({positions})"
            self._notify("spike", state.step, message)
            if config.action == "roll_back":
                raise LossSpikeError(f"after step {state.step} {message}", positions.start, positions.stop)
        return state

    def _report(self, state: TrainState, losses: Sequence[Losses], result: StepResult) -> None:
        metrics = self._observer.report(state, losses, result.grad_norm)
        if metrics is not None:
            self._uncommitted[state.step] = metrics

    def _report_substitutions(self, state: TrainState, batches: StepBatches) -> None:
        for found in self._bad_samples.note(batches.substitutions):  # a collective
            message = f"{found.cause}; {found.substitute!r} takes its place at position {found.position}"
            self._notify("substituted", state.step, message)

    def _report_skip(self, state: TrainState, batches: StepBatches, losses: Sequence[Losses]) -> None:
        keys = non_finite_keys([batch.keys for batch in batches.micro_batches], losses, self._run.ranks)
        first = state.position - self._training.global_batch
        cause = (
            f"the loss of {', '.join(keys)} is not finite" if keys else "all losses are finite but a gradient is not"
        )
        message = f"update skipped, {cause} (positions {first} to {state.position - 1} of the data order)"
        self._notify("skipped", state.step, message)
        if state.skipped > self._training.max_skipped_steps:
            raise TrainingError(
                f"{state.skipped} updates in a row were skipped after step {state.step}, more than "
                f"training.max_skipped_steps ({self._training.max_skipped_steps}); the last: {message}. "
                "Lower training.optimizer.lr, or look at these images"
            )

    def _end(self, kind: NoticeKind, state: TrainState) -> TrainState:
        self._save(state)
        commit = self._run.saver.finish()
        assert commit is not None
        self._announce(commit)
        if kind == "drained" and self._run.ranks.is_first:
            ending = Ending("drained", "a machine of the run is about to go away")
            write_ending(self._run.storage, self._run.job.run_folder, self._run.job.attempt, ending)
        self._notify(kind, state.step, f"checkpoint {commit.url}")
        return state

    def _save(self, state: TrainState) -> None:
        self._observer.enter("checkpoint")
        self._announce(self._run.saver.finish())  # every commit is heard of, also where the next one follows at once
        self._run.saver.save(self._run.engine, state, self._uncommitted)
        self._uncommitted.clear()

    def _announce(self, commit: CommittedCheckpoint | None) -> None:
        """Tell the reporter of a commit, once."""
        if commit is not None and commit.step > self._announced:
            self._announced = commit.step
            self._reporter.report(CommitReport(commit))

    def _notify(self, kind: NoticeKind, step: int, message: str) -> None:
        if self._run.ranks.is_first:
            self._reporter.report(Notice(kind, step, message))
