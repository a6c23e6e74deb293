"""A tiny run for end-to-end training tests: its data, its recipe, and faults to inject into its ranks."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

import m2f.trainer.engine.module
from m2f.cluster.evaluation.queue import read_entries
from m2f.cluster.recipe.config import ClusterConfig, RunConfig
from m2f.cluster.tracking.tracked_run import TrackedRun
from m2f.data_pipeline.config import DataConfig, DatasetConfig, LargeScaleJitter, MixtureItem
from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.readers import open_reader, source_fingerprint
from m2f.data_pipeline.shards.write import commit_manifest, plan_shards, write_shard
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationConfig, EvaluationSet
from m2f.model.config import (
    LossConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    TimmBackboneConfig,
)
from m2f.trainer.checkpoint.commits import list_commits
from m2f.trainer.checkpoint.folder import newest_undamaged
from m2f.trainer.config import CheckpointConfig, OptimizerConfig, TrainingConfig
from tests.waiting import PATIENCE_S

STEPS = 12
EVERY = 4
BATCH = 4
PAUSE_S = 0.3
GATE = ""
"""Path of a file for which `slow_loop` waits after the second-to-last checkpoint. If empty, it does not wait."""


def write_shards(config: DatasetConfig, storage: Storage) -> None:
    assert config.source is not None
    reader = open_reader(config.source, config.max_pixels)
    plan = plan_shards(reader, config, source_fingerprint(config.source))
    parts = [write_shard(reader, plan, index, storage) for index in range(len(plan.shard_keys))]
    commit_manifest(plan, parts, storage)


def small_sets(folder: str, storage: Storage) -> dict[str, DatasetConfig]:
    datasets = {
        "train": DatasetConfig(shards=f"{folder}/train", source=SyntheticSource(num_images=24)),
        "val": DatasetConfig(
            shards=f"{folder}/val", source=SyntheticSource(num_images=20, seed=1, image_id_start=1001)
        ),
    }
    for config in datasets.values():
        write_shards(config, storage)
    return datasets


def tiny_config(folder: Path, name: str, datasets: dict[str, DatasetConfig]) -> RunConfig:
    return RunConfig(
        name=name,
        output=str(folder / "runs"),
        datasets=datasets,
        data=DataConfig(
            train=(MixtureItem(dataset="train"),),
            augment=LargeScaleJitter(size=64, min_scale=0.8, max_scale=1.2),
            workers=0,
            lanes=4,
            window=8,
        ),
        model=ModelConfig(
            backbone=TimmBackboneConfig(name="resnet10t", norm="group", options={"channels": [8, 16, 16, 32]}),
            pixel_decoder=MSDeformAttnPixelDecoderConfig(
                conv_dim=16, mask_dim=16, num_layers=1, num_heads=2, feedforward_dim=32
            ),
            transformer_decoder=MaskedTransformerDecoderConfig(
                num_queries=8, num_layers=2, hidden_dim=16, num_heads=2, feedforward_dim=32
            ),
            loss=LossConfig(num_points=64),
        ),
        training=TrainingConfig(
            max_steps=STEPS,
            global_batch=BATCH,
            micro_batch=2,
            optimizer=OptimizerConfig(lr=1e-4, clip_norm=1.0),  # at 1e-3, rounding errors grow to 8e-5 in 40 steps
            checkpoint=CheckpointConfig(every_steps=EVERY, keep=10),
            log_every_steps=1,
            collective_timeout_s=1200.0 if any("://" in config.shards for config in datasets.values()) else 60.0,
        ),
        evaluation=EvaluationConfig(
            sets=(EvaluationSet(dataset="val"),),
            tasks=("panoptic", "semantic"),
            extra_metrics=("boundary",),
            shortest_edge=64,
            max_size=96,
            panels=2,
        ),
        cluster=ClusterConfig(num_workers=2),
    )


def with_small_evaluation(config: RunConfig) -> RunConfig:
    """Evaluate two images with one metric and without panels, for tests in which the results do not matter."""
    sets = tuple(replace(item, limit=2) for item in config.evaluation.sets)
    evaluation = replace(config.evaluation, sets=sets, tasks=("panoptic",), extra_metrics=(), panels=0)
    return replace(config, evaluation=evaluation)


def tracked_points(run: TrackedRun, metric: str) -> list[tuple[int, float]]:
    """Return the sorted (step, value) points of a metric in MLflow, including steps that were logged twice."""
    from mlflow import MlflowClient  # imported here, because ranks do not need it

    history = MlflowClient(tracking_uri=run.uri).get_metric_history(run.run_id, metric)
    return sorted((point.step, point.value) for point in history)


def assert_equal_weights(first: str, second: str) -> None:
    """Assert that the newest checkpoints of two run folders have bit-identical weights; their metadata may differ."""
    urls = [newest_undamaged(Storage(), folder).url for folder in (first, second)]
    assert_equal_files(*(Path(url, "weights.safetensors") for url in urls))


def assert_equal_files(first: Path, second: Path) -> None:
    """Assert that two weight files have bit-identical weights; their metadata may differ."""
    first_weights, second_weights = load_file(first), load_file(second)
    assert first_weights.keys() == second_weights.keys()
    assert all(torch.equal(first_weights[name], second_weights[name]) for name in first_weights)


@contextmanager
def changed_losses(change):
    """Replace the losses of every micro-batch by `change(losses, targets)`."""
    original = m2f.trainer.engine.module.compute_losses

    def changed(predictions, targets, *rest):
        return change(original(predictions, targets, *rest), targets)

    m2f.trainer.engine.module.compute_losses = changed
    try:
        yield
    finally:
        m2f.trainer.engine.module.compute_losses = original


class OutOfMemoryInBackward(torch.autograd.Function):
    """Identity function whose backward pass raises OutOfMemoryError."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def out_of_memory(position, losses, targets):
    """Raise OutOfMemoryError in the backward pass of a micro-batch of several images that includes `position`."""
    if len(targets.position) > 1 and (targets.position == position).any():
        return losses._replace(total=OutOfMemoryInBackward.apply(losses.total))
    return losses


def spike(start, losses, targets):
    """Multiply the loss by 100 in the two steps, of four images each, that start at position `start`."""
    factor = torch.where(((targets.position >= start) & (targets.position < start + 8)).any(), 100.0, 1.0)
    return losses._replace(total=losses.total * factor, terms=losses.terms * factor)


def slow_loop(arguments):
    """Train slowly in a Ray worker, so that the test can change the cluster during the run.

    Rank 0 writes its node id to `node_of_rank_0` in the run folder.
    """
    import ray
    import ray.train

    from m2f.cluster.train.worker import train_loop

    folder = arguments["settings"].job.run_folder
    if ray.train.get_context().get_world_rank() == 0 and "://" not in folder:
        Path(folder, "node_of_rank_0").write_text(ray.get_runtime_context().get_node_id())

    def wait(losses, targets):
        time.sleep(PAUSE_S)
        while GATE and int(targets.position.max()) >= BATCH * (STEPS - EVERY) and not Path(GATE).exists():
            time.sleep(PAUSE_S)
        return losses

    with changed_losses(wait):
        train_loop(arguments)


@contextmanager
def refused_upload(marker: Path):
    """Refuse the first upload of rank 1, and create the file `marker` when this happens."""
    original = Storage.put_file

    def put_file(self, url, path):
        if "zero_pp_rank_1" in url and not marker.exists():
            marker.touch()
            raise StorageError(f"{url}: the store refuses to write (AccessDenied)")
        original(self, url, path)

    Storage.put_file = put_file
    try:
        yield
    finally:
        Storage.put_file = original


def faulty_loop(arguments):
    """Train in a Ray worker with three faults.

    The first upload of rank 1 is refused, step 5 runs out of memory, and the loss spikes in steps 8 and 9. Step 5 waits
    for the commit of step 4, and step 9 waits for the evaluation of step 8.
    """
    from m2f.cluster.train.worker import train_loop

    folder = Path(arguments["settings"].job.run_folder)
    queue_file = str(folder / "evaluations" / "queue.json")
    first_attempt = not (folder / "refused").exists()

    def inject_faults(losses, targets):
        position = int(targets.position.max())
        if first_attempt:
            return losses
        if 16 <= position < 20:
            _wait_for(lambda: list_commits(Storage(), str(folder)))
        if 32 <= position < 36:
            _wait_for(lambda: any(entry.step == 8 and entry.settled for entry in read_entries(Storage(), queue_file)))
        return spike(28, out_of_memory(17, losses, targets), targets)

    with refused_upload(folder / "refused"), changed_losses(inject_faults):
        train_loop(arguments)


def _wait_for(condition) -> None:
    """Wait for a condition. Workers cannot import `wait_until`, but get the value of PATIENCE_S with this module."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def buggy_loop(arguments):
    """Train in a Ray worker with a bug that occurs only on rank 1 in step 3."""
    from m2f.cluster.train.worker import train_loop

    def inject_bug(losses, targets):
        if (targets.position == 9).any():
            Path(arguments["settings"].job.run_folder, "mistake").touch()
            raise ValueError("the colour of sample 9 is wrong")
        return losses

    with changed_losses(inject_bug):
        train_loop(arguments)
