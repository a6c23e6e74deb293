from dataclasses import replace

import pytest

from m2f.cluster.recipe.config import ClusterConfig, RunConfig
from m2f.cluster.start.evaluator_memory import evaluator_bytes
from m2f.data_pipeline.config import DataConfig, DatasetConfig, MixtureItem
from m2f.eval.config import EvaluationConfig, EvaluationSet, WholeImage
from m2f.model.config import ModelConfig, TimmBackboneConfig
from m2f.trainer.config import TrainingConfig
from m2f.trainer.memory.states import CONTEXT_BYTES, remaining_evaluator_bytes

MODEL = ModelConfig(backbone=TimmBackboneConfig(name="resnet10t"), num_classes=3)


def run(actors=1, rank=0.75, actor=0.25, sets=True, edge=128, square=False):
    return RunConfig(
        name="run",
        datasets={"train": DatasetConfig(shards="shards")},
        data=DataConfig(train=(MixtureItem(dataset="train"),)),
        training=TrainingConfig(max_steps=1),
        cluster=ClusterConfig(num_workers=1, num_gpus_per_worker=rank),
        evaluation=EvaluationConfig(
            sets=(EvaluationSet(dataset="train"),) if sets else (),
            actors=actors,
            num_gpus_per_actor=actor,
            shortest_edge=edge,
            max_size=2 * edge,
            test_time=WholeImage(square=square),
        ),
    )


@pytest.mark.parametrize("settings", [{"sets": False}, {"rank": 1.0, "actor": 1.0}, {"actor": 0.0}, {"rank": 0.0}])
def test_actors_without_a_shared_gpu_need_no_memory_on_it(settings):
    assert evaluator_bytes(run(**settings), MODEL) == 0


def test_actor_memory_covers_weights_activations_and_cuda_context():
    small = evaluator_bytes(run(), MODEL)
    weights = 4 * 25_000_000
    assert CONTEXT_BYTES + 0.5 * weights < small < CONTEXT_BYTES + 4 * weights
    assert evaluator_bytes(run(edge=512), MODEL) > small + 100_000_000
    assert evaluator_bytes(run(square=True), MODEL) > small + 1_000_000
    assert evaluator_bytes(run(actors=2, actor=0.125), MODEL) == 2 * small
    assert (
        evaluator_bytes(replace(run(), cluster=ClusterConfig(num_workers=2, num_gpus_per_worker=0.75)), MODEL) == small
    )


@pytest.mark.parametrize(
    ("used_bytes", "remaining_bytes"),
    [(0, 3e9), (CONTEXT_BYTES, 3e9), (CONTEXT_BYTES + 1e9, 2e9), (CONTEXT_BYTES + 3e9, 0), (20e9, 0)],
)
def test_running_actors_are_not_counted_twice(used_bytes, remaining_bytes):
    assert remaining_evaluator_bytes(int(3e9), int(used_bytes)) == remaining_bytes
