"""Training loop of one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from m2f.data_pipeline.loading.loader import StepBatches
from m2f.data_pipeline.transforms.collate import Batch
from m2f.model.loss.criterion import Losses, Normalizers, count_normalizers
from m2f.trainer.checkpoint.folder import checkpoint_url
from m2f.trainer.data import OpenData
from m2f.trainer.engine.device_copies import DeviceCopies
from m2f.trainer.engine.engine import StepResult
from m2f.trainer.engine.queued_step import QueuedStep
from m2f.trainer.engine.schedule import backbone_lr_factor, lr_factor
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
from m2f.trainer.telemetry.metrics import non_finite_keys, sum_over_ranks
from m2f.trainer.telemetry.numbers import LossValues, StepMetrics
from m2f.trainer.telemetry.phases import Phase


def train(job: TrainJob, reporter: Reporter, control: Control, open_data: OpenData) -> TrainState:
    """Train until `max_steps` or until `control` requests the end, resuming from the run's newest undamaged checkpoint.

    Every rank calls this inside a process group. Returns the final state, which is saved in a committed checkpoint.
    Raises TrainingError (on all ranks if loading data or uploading fails on one), CheckpointError, DataError,
    StorageError and ConfigError.
    """
    with open_run(job, reporter, open_data) as run, Observer(run, reporter) as observer:
        return _Loop(run, reporter, control, observer).run()


class _Loop:
    """Runs the steps of one rank, from the first one to the last checkpoint."""

    def __init__(self, run: Run, reporter: Reporter, control: Control, observer: Observer) -> None:
        self._run = run
        self._training = run.job.training
        self._reporter = reporter
        self._control = control
        self._observer = observer
        self._copies = DeviceCopies(run.engine.device)
        self._bad_samples = BadSamples(run.job.data.max_bad_samples, run.ranks)
        self._announced = -1
        self._queued: tuple[QueuedStep, dict[Phase, float]] | None = None
        """A step whose outcome the host has not read yet, and the seconds of its phases."""
        self._uncommitted: dict[int, StepMetrics] = {}
        """On rank 0: metrics since the last save, by step."""

    def run(self) -> TrainState:
        training, engine, state = self._training, self._run.engine, self._run.state
        if self._run.resumed is not None:
            self._announce(self._run.resumed)
            self._notify("resumed", state.step, f"from {self._run.resumed.url}")
        while state.step < training.max_steps:
            batches, on_device, facts = self._next_step(state)
            if facts.substitutions:
                self._report_substitutions(state, batches)
            if facts.stop or facts.drain:
                return self._end("stopped" if facts.stop else "drained", self._finish_queued_step(state))
            # A queued step is counted as applied, because it is not yet known whether it was skipped.
            engine.module.model.set_progress(state.step + (self._queued is not None), training.max_steps)
            losses = self._forward_backward(batches, on_device, facts, state)
            state = self._finish_queued_step(state)
            state = replace(state, position=batches.step * training.global_batch)  # beyond skipped positions
            progress = training.schedule, state.step, training.max_steps
            engine.set_lr_factor(lr_factor(*progress), backbone_lr_factor(*progress))
            step = self._update(batches, facts, losses, state)
            if engine.runs_ahead and not self._is_due(state.step + 1):
                self._queued = step, self._observer.lap()
            else:
                state = self._finish_step(state, step)
        return self._end("finished", state)

    def _is_due(self, step: int) -> bool:
        """Return whether a report, a checkpoint or the end of the run needs the outcome of `step` immediately."""
        training = self._training
        intervals = (training.log_every_steps, training.checkpoint.every_steps)
        return step >= training.max_steps or any(step % every == 0 for every in intervals)

    def _finish_queued_step(self, state: TrainState) -> TrainState:
        """Finish the queued step, if any, and return the new state.

        In the loop, the device already has the next forward and backward passes queued, so it is not idle meanwhile.
        """
        if self._queued is None:
            return state
        (step, phases), self._queued = self._queued, None
        return self._finish_step(state, step, phases)

    def _finish_step(self, state: TrainState, step: QueuedStep, phases: dict[Phase, float] | None = None) -> TrainState:
        """Read the outcome of a step; if due, report, detect spikes and save. Returns the new state."""
        training, values = self._training, step.read()
        result = self._run.engine.finish_update(state.step + 1, values.norm)
        state = state.advance(training.global_batch, result.applied)
        self._observer.record_step(state, step, values, result, self._observer.lap() if phases is None else phases)
        if not result.applied:
            self._report_skip(state, step)
            return state
        is_logged = state.step % training.log_every_steps == 0
        if is_logged or training.spikes.action != "off":
            loss = sum_over_ranks(values.terms, self._run.ranks)  # a collective
            state = self._check_for_spike(state, loss.total)
            if is_logged:
                self._report(state, loss, result)
        if state.step % training.checkpoint.every_steps == 0:
            self._save(state)
        return state

    def _next_step(self, state: TrainState) -> tuple[StepBatches, Iterator[Batch], StepFacts]:
        """Return this rank's batches, their copies on the device, and the facts of the step summed over all ranks.

        An error on any rank is raised on all.
        """
        batches, on_device, own_facts, error = None, None, StepFacts(), None
        self._observer.enter("data")
        try:
            batches = next(self._run.batches)
            with self._convert_out_of_memory(batches, state):
                on_device = self._copies.start(batches.micro_batches)
            own_facts = self._step_facts(batches)
        except Exception as caught:
            error = caught
        self._observer.enter("exchange")
        facts = self._run.ranks.exchange(own_facts, error)
        assert batches is not None
        assert on_device is not None
        if facts.committed:
            step, job = int(facts.committed), self._run.job
            self._announce(CommittedCheckpoint(step, checkpoint_url(job.run_folder, step, job.lease)))
        return batches, on_device, facts

    def _step_facts(self, batches: StepBatches) -> StepFacts:
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

    def _forward_backward(
        self, batches: StepBatches, on_device: Iterator[Batch], facts: StepFacts, state: TrainState
    ) -> list[Losses]:
        engine = self._run.engine
        # Filled on the device: a copy from the host would wait for all queued work.
        sums = (facts.num_masks, facts.class_weight_sum, facts.micro_batches)
        normalizers = Normalizers(*(torch.full((), number, device=engine.device) for number in sums))
        losses = []
        with self._convert_out_of_memory(batches, state):
            for batch in on_device:
                self._observer.enter("forward")
                losses.append(engine.accumulate(batch, normalizers))
        self._observer.enter("update")
        return losses

    def _update(
        self, batches: StepBatches, facts: StepFacts, losses: Sequence[Losses], state: TrainState
    ) -> QueuedStep:
        with self._convert_out_of_memory(batches, state):
            return QueuedStep(batches, facts.images, losses, self._run.engine.update())

    @contextmanager
    def _convert_out_of_memory(self, batches: StepBatches, state: TrainState) -> Iterator[None]:
        """Convert out-of-memory errors to OutOfMemoryError. Only the rank whose memory is full raises it."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            step, size = state.step + 1 + (self._queued is not None), len(batches.micro_batches[0].keys)
            raise OutOfMemoryError(
                f"out of memory in step {step} with {size} images at once (training.micro_batch): {error}", size
            ) from error

    def _check_for_spike(self, state: TrainState, loss: float) -> TrainState:
        """Add this step's loss to the state. Report a complete spike; with `roll_back`, raise LossSpikeError."""
        config = self._training.spikes
        if config.action == "off":
            return state
        previous, first = state.losses, state.position - self._training.global_batch
        state = replace(state, losses=previous.after(loss, first, config))
        if state.losses.high == config.steps:
            typical, deviation = previous.typical()
            positions = PositionRange(state.losses.start, state.position)
            message = f"the loss is {loss:.4g}, but is usually {typical:.4g} +- {deviation:.2g} ({positions})"
            self._notify("spike", state.step, message)
            if config.action == "roll_back":
                raise LossSpikeError(f"after step {state.step} {message}", positions.start, positions.stop)
        return state

    def _report(self, state: TrainState, loss: LossValues, result: StepResult) -> None:
        metrics = self._observer.report(state, loss, result.grad_norm)
        if metrics is not None:
            self._uncommitted[state.step] = metrics

    def _report_substitutions(self, state: TrainState, batches: StepBatches) -> None:
        for found in self._bad_samples.add(batches.substitutions):  # a collective
            message = f"{found.cause}; replaced by {found.substitute!r} at position {found.position}"
            self._notify("substituted", state.step, message)

    def _report_skip(self, state: TrainState, step: QueuedStep) -> None:
        keys = non_finite_keys([batch.keys for batch in step.batches.micro_batches], step.losses, self._run.ranks)
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
                "Lower training.optimizer.lr, or check these images"
            )

    def _end(self, kind: NoticeKind, state: TrainState) -> TrainState:
        self._save(state)
        commit = self._run.saver.finish()
        assert commit is not None
        self._announce(commit)
        if kind == "drained" and self._run.ranks.is_first:
            ending = Ending("drained", "a machine of the run is about to shut down")
            write_ending(self._run.storage, self._run.job.run_folder, self._run.job.attempt, ending)
        self._notify(kind, state.step, f"checkpoint {commit.url}")
        return state

    def _save(self, state: TrainState) -> None:
        self._observer.enter("checkpoint")
        self._announce(self._run.saver.finish())  # report every commit, even if the next one follows immediately
        self._run.saver.save(self._run.engine, state, self._uncommitted)
        self._uncommitted.clear()

    def _announce(self, commit: CommittedCheckpoint | None) -> None:
        """Report a commit, once."""
        if commit is not None and commit.step > self._announced:
            self._announced = commit.step
            self._reporter.report(CommitReport(commit))

    def _notify(self, kind: NoticeKind, step: int, message: str) -> None:
        if self._run.ranks.is_first:
            self._reporter.report(Notice(kind, step, message))
