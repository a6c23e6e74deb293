import re
from dataclasses import replace

import pytest

from m2f.cluster.recipe.config import ClusterConfig, RunConfig
from m2f.cluster.recipe.devices import (
    AvailableDevices,
    AvailableGpu,
    StoredChoices,
    cluster_gpus,
    device_index,
    evaluation_devices,
    settle,
)
from m2f.data_pipeline.config import DataConfig, DatasetConfig, LargeScaleJitter, MixtureItem, ScaleJitter
from m2f.eval.config import EvaluationConfig, EvaluationSet
from m2f.model.errors import ConfigError
from m2f.trainer.config import TrainingConfig, ZeroConfig
from m2f.trainer.precision import default_precision

H100, T4, P100 = (AvailableGpu(name, cap) for name, cap in (("H100", (9, 0)), ("T4", (7, 5)), ("P100", (6, 0))))
AUTO = "auto"


def recipe(
    workers=AUTO,
    gpus=AUTO,
    evaluating=AUTO,
    actors=1,
    sets=True,
    precision=AUTO,
    batch=16,
    compiles=AUTO,
    stage=1,
    augment=LargeScaleJitter(),  # noqa: B008
):
    return RunConfig(
        name="run",
        datasets={"train": DatasetConfig(shards="shards")},
        data=DataConfig(train=(MixtureItem(dataset="train"),), augment=augment),
        training=TrainingConfig(
            max_steps=1, global_batch=batch, precision=precision, compile=compiles, zero=ZeroConfig(stage=stage)
        ),
        cluster=ClusterConfig(num_workers=workers, num_gpus_per_worker=gpus),
        evaluation=EvaluationConfig(
            sets=(EvaluationSet(dataset="train"),) if sets else (), num_gpus_per_actor=evaluating, actors=actors
        ),
    )


@pytest.mark.parametrize(
    ("settings", "gpus", "workers", "each", "actor", "precision"),
    [
        ({}, [], 1, 0, 0, "fp32"),
        ({"workers": 2}, [], 2, 0, 0, "fp32"),
        ({"gpus": 0}, [], 1, 0, 0, "fp32"),
        ({"evaluating": 0.5}, [H100], 1, 0.5, 0.5, "bf16_autocast"),
        ({"evaluating": 0.4}, [H100] * 2, 2, 0.6, 0.4, "bf16_autocast"),
        ({"evaluating": 0.5, "workers": 1}, [H100] * 2, 1, 1, 0.5, "bf16_autocast"),
        ({"precision": "bf16_autocast"}, [], 1, 0, 0, "bf16_autocast"),
        ({}, [H100], 1, 0.75, 0.25, "bf16_autocast"),
        ({"sets": False}, [H100], 1, 1, 1, "bf16_autocast"),
        ({"actors": 2}, [H100], 1, 0.75, 0.125, "bf16_autocast"),
        ({"actors": 3}, [H100], 1, 0.75, 0.0833, "bf16_autocast"),
        ({"precision": "fp32"}, [H100], 1, 0.75, 0.25, "fp32"),
        ({}, [T4], 1, 0.75, 0.25, "fp16_autocast"),
        ({}, [P100], 1, 0.75, 0.25, "fp32"),
        ({}, [H100, T4], 2, 0.75, 0.25, "fp16_autocast"),
        ({}, [H100] * 4, 4, 0.75, 0.25, "bf16_autocast"),
        ({"batch": 2}, [H100] * 4, 2, 1, 1, "bf16_autocast"),
        ({"workers": 2}, [H100] * 4, 2, 1, 1, "bf16_autocast"),
        ({"workers": 2}, [H100] * 2, 2, 0.75, 0.25, "bf16_autocast"),
        ({"workers": 2}, [H100], 1, 0.75, 0.25, "bf16_autocast"),
        ({"workers": (1, 4)}, [H100] * 4, (1, 4), 0.75, 0.25, "bf16_autocast"),
        ({"workers": (1, 4), "batch": 2}, [H100] * 4, (1, 2), 1, 1, "bf16_autocast"),
        ({"workers": (2, 4), "batch": 2}, [], (2, 2), 0, 0, "fp32"),
        ({"workers": 32}, [H100] * 4, 4, 0.75, 0.25, "bf16_autocast"),
        ({"evaluating": 1}, [H100] * 4, 3, 1, 1, "bf16_autocast"),
        ({"evaluating": 1, "actors": 2}, [H100] * 4, 2, 1, 1, "bf16_autocast"),
        ({"evaluating": 0}, [H100], 1, 1, 0, "bf16_autocast"),
        ({"evaluating": 0.2}, [H100], 1, 0.75, 0.2, "bf16_autocast"),
        ({"gpus": 1}, [H100], 1, 1, 0, "bf16_autocast"),
        ({"gpus": 1}, [H100] * 4, 4, 1, 0, "bf16_autocast"),
        ({"gpus": 1, "workers": 3}, [H100] * 4, 3, 1, 1, "bf16_autocast"),
        ({"gpus": 0.6}, [H100], 1, 0.6, 0.4, "bf16_autocast"),
        ({"gpus": 0.5, "workers": 1}, [H100], 1, 0.5, 0.5, "bf16_autocast"),
        ({"gpus": 0.5}, [H100] * 2, 1, 0.5, 1, "bf16_autocast"),
        ({"gpus": 0}, [H100], 1, 0, 0, "fp32"),
        ({"gpus": 2}, [H100] * 4, 2, 2, 0, "bf16_autocast"),
    ],
)
def test_auto_resolves_workers_gpus_and_precision(settings, gpus, workers, each, actor, precision):
    settled = settle(recipe(**settings), AvailableDevices(tuple(gpus))).config
    assert settled.cluster.num_workers == workers
    assert settled.cluster.num_gpus_per_worker == each
    assert settled.evaluation.num_gpus_per_actor == pytest.approx(actor)
    assert settled.training.precision == precision
    assert settle(settled, AvailableDevices(tuple(gpus))).config == settled


@pytest.mark.parametrize(
    ("settings", "gpus", "warning"),
    [
        ({}, [], None),
        ({}, [H100], None),
        ({"gpus": 0}, [H100], r"1 GPU \(H100\) stay idle, as cluster\.num_gpus_per_worker is 0; set it to auto"),
        ({"evaluating": 1}, [], "num_gpus_per_actor is 1, but torch sees no GPU: evaluating on the CPU"),
        ({"gpus": 1}, [H100], r"evaluation runs on the CPU: cluster\.num_gpus_per_worker 1 leaves no GPU"),
        (
            {"workers": 2},
            [H100],
            "cluster.num_workers is 2, but torch sees 1 GPU, .* with 1 worker and the same global",
        ),
        (
            {"workers": (4, 32)},
            [],
            r"num_workers is \[4, 32\], but training.global_batch is 16, .* training with at most 16 workers",
        ),
    ],
)
def test_settle_warns_of_idle_missing_and_unshared_gpus(settings, gpus, warning):
    warnings = settle(recipe(**settings), AvailableDevices(tuple(gpus))).warnings
    assert len(warnings) == (warning is not None)
    if warning is not None:
        assert re.search(warning, warnings[0])


@pytest.mark.parametrize(
    ("settings", "gpus", "problem"),
    [
        ({"gpus": 1}, [], "num_gpus_per_worker is 1 with 1 worker, but torch sees none; set .* to auto"),
        ({"gpus": 1, "workers": 2}, [H100], "with 2 workers, but torch sees 1; set"),
        ({"gpus": 0.5, "workers": 2}, [H100] * 2, "two ranks could share one GPU, which NCCL does not support"),
    ],
)
def test_missing_and_shared_gpus_are_rejected(settings, gpus, problem):
    with pytest.raises(ConfigError, match=problem):
        settle(recipe(**settings), AvailableDevices(tuple(gpus)))


@pytest.mark.parametrize("workers", [17, (17, 32)])
def test_more_workers_than_images_per_step_are_rejected(workers):
    with pytest.raises(ConfigError, match=r"requires 17 workers, but training\.global_batch is 16, .* lower"):
        settle(recipe(workers=workers), AvailableDevices())


def test_cluster_that_may_grow_accepts_missing_gpus():
    devices = AvailableDevices((), "the Ray cluster has", may_grow=True)
    assert settle(recipe(gpus=1, workers=8), devices).config.cluster.num_workers == 8
    settled = settle(recipe(), devices)
    assert settled.config.cluster.num_gpus_per_worker == 0
    assert settled.warnings == (
        "the Ray cluster has no GPU now: training on its CPUs. If GPUs are added, set cluster.num_gpus_per_worker to 1",
    )


def test_evaluation_after_training_gets_a_whole_gpu():
    settled = settle(recipe(), AvailableDevices((H100,)), during_training=False).config
    assert (settled.cluster.num_gpus_per_worker, settled.evaluation.num_gpus_per_actor) == (1, 1)


@pytest.mark.parametrize(
    ("settings", "gpus", "stored", "expected"),
    [
        ({}, [H100], None, True),
        ({}, [], None, False),
        ({"gpus": 0}, [H100], None, False),
        ({"stage": 3}, [H100], None, False),
        ({"augment": ScaleJitter()}, [H100], None, False),
        ({"compiles": False}, [H100], True, False),
        ({"compiles": True}, [], False, True),
        ({}, [H100], False, False),
        ({}, [], True, True),
        ({"stage": 3}, [H100], True, False),
    ],
)
def test_auto_compiles_on_gpus_if_the_settings_allow_it(settings, gpus, stored, expected):
    devices = AvailableDevices(tuple(gpus))
    assert settle(recipe(**settings), devices, StoredChoices(compile=stored)).config.training.compile is expected


def test_auto_warns_instead_of_compiling_on_gpus_without_a_compiler():
    devices = AvailableDevices((H100,), has_compiler=False)
    settled = settle(recipe(), devices)
    assert settled.config.training.compile is False
    assert len(settled.warnings) == 1
    assert "no C compiler" in settled.warnings[0]
    assert settle(recipe(compiles=True), devices).config.training.compile is True
    for quiet in (recipe(compiles=False), recipe(stage=3), recipe(gpus=0)):
        assert not any("compiler" in warning for warning in settle(quiet, devices).warnings)


def test_continued_run_keeps_its_precision():
    fp32, bf16 = StoredChoices("fp32"), StoredChoices("bf16_autocast")
    assert settle(recipe(), AvailableDevices((H100,)), fp32).config.training.precision == "fp32"
    assert settle(recipe(), AvailableDevices(), bf16).config.training.precision == "bf16_autocast"
    assert settle(recipe(precision="bf16"), AvailableDevices(), fp32).config.training.precision == "bf16"


@pytest.mark.parametrize(
    ("settings", "gpus", "line"),
    [
        ({}, [], "device: 1 worker on the CPU, as torch sees no GPU; precision fp32; evaluation on the CPU"),
        ({"gpus": 0, "sets": False}, [H100], "device: 1 worker on the CPU, as the recipe says; precision fp32"),
        ({}, [H100], "device: 1 worker, 0.75 H100 each; precision bf16_autocast, compiled; evaluation on 0.25 GPU"),
        ({"sets": False}, [H100] * 2, "device: 2 workers, one H100 each; precision bf16_autocast, compiled"),
    ],
)
def test_devices_are_described_in_one_line(settings, gpus, line):
    assert settle(recipe(**settings), AvailableDevices(tuple(gpus))).line == line


@pytest.mark.parametrize(
    ("settings", "gpus", "cores", "hints"),
    [
        ({}, [], 0, []),
        ({}, [], 1, ["data.augment.size=256"]),
        ({}, [], 8, ["data.augment.size=256", "1 core of 8 will be busy; training.threads=8"]),
        ({"workers": 2}, [], 8, ["data.augment.size=256", "2 cores of 8 will be busy; training.threads=4"]),
        ({"gpus": 0}, [H100], 2, ["data.augment.size=256", "1 core of 2"]),
        ({}, [H100], 8, []),
    ],
)
def test_run_on_the_cpu_gets_hints_to_make_it_faster(settings, gpus, cores, hints):
    found = settle(recipe(**settings), AvailableDevices(tuple(gpus), cores=cores)).hints
    assert len(found) == len(hints)
    for hint, part in zip(found, hints, strict=True):
        assert part in hint


@pytest.mark.parametrize(
    ("asked", "gpus", "may_grow", "each", "warned"),
    [
        (AUTO, [], False, 0, False),
        (AUTO, [H100], False, 1, False),
        (0.25, [H100], False, 0.25, False),
        (1.0, [], False, 0, True),
        (1.0, [], True, 1, False),
    ],
)
def test_evaluation_without_training_uses_one_gpu_per_actor_or_warns(asked, gpus, may_grow, each, warned):
    settled = evaluation_devices(recipe(evaluating=asked), AvailableDevices(tuple(gpus), may_grow=may_grow))
    assert settled.config.evaluation.num_gpus_per_actor == each
    assert bool(settled.warnings) == warned
    assert settled.config.cluster == replace(recipe().cluster)


def test_accelerator_type_determines_compute_capability():
    nodes = [{"CPU": 4.0}, {"GPU": 2.0, "accelerator_type:T4": 1.0}, {"GPU": 1.0}]
    found = cluster_gpus(nodes)
    assert [gpu.name for gpu in found] == ["T4", "T4", "GPU"]
    assert default_precision([gpu.capability for gpu in found]) == "fp16_autocast"


@pytest.mark.parametrize(
    ("assigned", "visible", "index"),
    [([0], "0", 0), ([3], "1,3", 1), (["3"], "3, 1", 0), ([2], None, 2), (["GPU-b"], "GPU-a,GPU-b", 1)],
)
def test_rank_uses_the_gpu_assigned_by_ray(assigned, visible, index):
    assert device_index(assigned, visible) == index


def test_assigned_gpu_missing_in_cuda_visible_devices_is_rejected():
    with pytest.raises(ConfigError, match="Ray assigned GPU 2 to a worker, but CUDA_VISIBLE_DEVICES is '0,1'"):
        device_index([2], "0,1")


def test_actor_share_that_leaves_too_little_gpu_to_ranks_is_rejected():
    with pytest.raises(ConfigError, match=r"num_gpus_per_actor is 0\.5, and 1 actor on the 2 GPUs .* leave 0\.5"):
        settle(recipe(evaluating=0.5), AvailableDevices((H100, H100)))


def test_actor_does_not_span_several_gpus():
    with pytest.raises(ConfigError, match=r"3 actors on the 2 GPUs of the ranks"):  # each of the 2 free GPUs holds one
        settle(recipe(evaluating=0.6, actors=3, workers=2), AvailableDevices((H100,) * 4))
