"""The peer's plain training loop can be stopped and resumed, and our model loads its final weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.quality.arms import ARMS, IMAGE_SETS, Run
from benchmarks.quality.plain_loop import CHECKPOINT, run_plain_loop
from benchmarks.quality.run_arms import make_shards
from benchmarks.quality.transformers_run import WEIGHTS
from m2f.cluster.train.compose import compose_job
from m2f.model.errors import ConfigError
from m2f.model.mask2former import build_model
from m2f.model.weights.load import load_weights
from m2f.trainer.job import ManualControl

SMALL = (
    "datasets.train.source.num_images=12",
    "datasets.val.source.num_images=4",
    "data.augment.size=64",
    "model.loss.num_points=64",
    "training.precision=fp32",
    "training.max_steps=3",
    "training.ema_decay=0.5",
)


class StopsBefore(ManualControl):
    """Control that requests a stop after `steps` steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.num_requests = -1
        self.steps = steps

    def stop_requested(self) -> bool:
        self.num_requests += 1
        return self.num_requests == self.steps


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    config = Run(IMAGE_SETS[0], ARMS[-1], 0).config(tmp_path_factory.mktemp("peer"), SMALL)
    make_shards(config)
    return compose_job(config)


def test_interrupted_run_ends_with_the_same_weights(job, tmp_path):
    whole, parts = (dataclasses.replace(job, run_folder=str(tmp_path / name)) for name in ("whole", "parts"))
    run_plain_loop(whole, ManualControl())
    run_plain_loop(parts, StopsBefore(2))
    assert (tmp_path / "parts" / CHECKPOINT).exists()
    assert not (tmp_path / "parts" / WEIGHTS).exists()
    run_plain_loop(parts, ManualControl())
    models = [build_model(job.model) for _ in range(2)]
    for model, name in zip(models, ("whole", "parts"), strict=True):
        assert load_weights(model, tmp_path / name / WEIGHTS).complete
    expected, found = (model.state_dict() for model in models)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_settings_that_the_peer_does_not_support_are_refused(job, tmp_path):
    training = dataclasses.replace(job.training, micro_batch=2)
    with pytest.raises(ConfigError, match=r"training\.micro_batch 2; training transformers requires fp32"):
        run_plain_loop(dataclasses.replace(job, training=training, run_folder=str(tmp_path)), ManualControl())
