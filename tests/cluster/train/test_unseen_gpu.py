"""Tests of GPUs that Ray counts but torch does not see.

The cause may be a broken GPU driver, or `ray start --num-gpus=1` on a machine without a GPU.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
from ray import cloudpickle
from ray.train import ControllerError

from m2f.cluster import ray_cluster
from m2f.cluster.evaluation.actor import EvaluationActor, EvaluationTask
from m2f.cluster.ray_cluster import cluster_devices
from m2f.cluster.recipe.devices import AvailableDevices, AvailableGpu, settle
from m2f.cluster.train import ray_launcher
from m2f.cluster.train.failure_policy import Attempt, AttemptHistory, Stop, classify_attempt, decide
from m2f.cluster.train.supervisor import _Supervisor
from m2f.cluster.train.torch_backend import CheckedTorch, CheckedTorchConfig, WorkerGpu, invisible_gpu_problem
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationConfig
from m2f.eval.errors import EvaluationError
from m2f.trainer.errors import TrainingError
from tests.cluster.tiny_run import small_sets, tiny_config

GPU = AvailableGpu("GPU", (8, 0))


def worker(node, assigned="0", is_visible=True):
    return WorkerGpu(node, assigned, is_visible, "torch 2.9.0 with CUDA 12.8")


def test_message_names_ranks_without_gpu_and_their_nodes():
    assert invisible_gpu_problem([worker("a"), worker("b", assigned=None, is_visible=False)]) is None, (
        "a rank on the CPU needs none"
    )
    problem = invisible_gpu_problem(
        [worker("a"), worker("b", "1", is_visible=False), worker("c", "0", is_visible=False)]
    )
    assert problem is not None
    assert "rank 1 on node b (GPU 1), rank 2 on node c (GPU 0); torch 2.9.0 with CUDA 12.8. Run" in problem
    assert "`nvidia-smi` and `m2f doctor` on b;" in problem
    assert "cluster.num_gpus_per_worker=0" in problem
    many = invisible_gpu_problem([worker("b", is_visible=False)] * 64)
    assert many is not None
    assert "and 54 more" in many


def test_gpus_are_checked_before_the_process_group_is_created(monkeypatch):
    backend, started = CheckedTorch(), []
    monkeypatch.setattr(backend, "_torch", SimpleNamespace(on_start=lambda *_: started.append(1)))
    with pytest.raises(TrainingError, match="rank 1 on node b"):
        backend.on_start(SimpleNamespace(execute=lambda _: [worker("a"), worker("b", is_visible=False)]), None)
    assert not started
    backend.on_start(SimpleNamespace(execute=lambda _: [worker("a"), worker("b")]), None)
    assert started
    assert CheckedTorchConfig(backend="nccl").backend_cls is CheckedTorch


@pytest.mark.parametrize(
    ("nodes", "driver", "task", "gpus"),
    [
        ([1], 0, False, 0),  # `ray start --num-gpus=1` on a machine without a GPU
        ([1], 0, True, 1),  # the driver of a Ray job, from which Ray hides the GPUs
        ([1], 1, None, 1),
        ([0], 0, None, 0),
        ([1, 1], 0, None, 2),  # several nodes: their GPUs are checked when ranks start
    ],
)
def test_single_node_cluster_has_the_gpus_that_torch_sees(nodes, driver, task, gpus, monkeypatch):
    listed = [{"Alive": True, "NodeID": str(i), "Resources": {"GPU": count}} for i, count in enumerate(nodes)]
    monkeypatch.setattr(ray, "nodes", lambda: listed)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0"))
    monkeypatch.setattr(ray_cluster, "local_gpus", lambda: (GPU,) * driver)
    monkeypatch.setattr(ray_cluster, "_ray_task_sees_gpu", lambda: task)  # None: not called
    devices = cluster_devices(may_grow=True)
    assert len(devices.gpus) == gpus
    assert ("Ray reports 1 GPU on" in devices.no_gpu_text) == (task is False)


def test_auto_trains_on_the_cpu_with_a_warning_if_torch_sees_no_gpu(tmp_path):
    config = tiny_config(tmp_path, "run", {name: DatasetConfig(shards="s") for name in ("train", "val")})
    settled = settle(config, AvailableDevices((), "Ray reports 1 GPU on n1, where torch sees", may_grow=True))
    assert settled.config.cluster.gpus_per_worker == 0
    assert settled.warnings[0].startswith("Ray reports 1 GPU on n1, where torch sees no GPU now: training on its CPUs.")


def test_error_during_worker_start_is_raised_to_the_user(tmp_path):
    """Ray's controller raises the pickled error as its own failure, so no rank has an error."""
    config = tiny_config(tmp_path, "run", {name: DatasetConfig(shards="s") for name in ("train", "val")})
    launcher = ray_launcher.RayLauncher(config)
    launcher._error = cloudpickle.loads(cloudpickle.dumps(ControllerError(TrainingError("rank 1 on node b"))))
    error = launcher.attempt_error()
    failure = classify_attempt(error, None)
    assert decide(AttemptHistory().after(Attempt(failure, 0)), 3) == Stop("a restart would fail in the same way")
    with pytest.raises(TrainingError, match="rank 1 on node b"):
        _Supervisor._give_up(SimpleNamespace(), error, failure)  # type: ignore[arg-type]


def test_evaluation_actor_without_its_gpu_raises(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = tiny_config(tmp_path, "run", {name: DatasetConfig(shards="s") for name in ("train", "val")})
    actor = EvaluationActor(replace(config, evaluation=replace(config.evaluation, num_gpus_per_actor=1)))
    with pytest.raises(EvaluationError, match=r"num_gpus_per_actor is 1, but torch sees no GPU on .*; run"):
        actor.evaluate(EvaluationTask("w", config.evaluation.sets[0]), 0)


@pytest.mark.cluster
@pytest.mark.slow
def test_run_on_cluster_with_unseen_gpus_stops_with_one_message(tmp_path, monkeypatch, capsys):
    config = replace(
        tiny_config(tmp_path, "blind", small_sets(str(tmp_path), Storage())), evaluation=EvaluationConfig()
    )
    ray.init("local", num_cpus=4, num_gpus=2, object_store_memory=80 * 2**20, log_to_driver=False)
    try:
        assert not cluster_devices(may_grow=True).gpus
        # as in a cluster with GPUs on other nodes
        devices = AvailableDevices((GPU, GPU), "the Ray cluster has", may_grow=True)
        monkeypatch.setattr(ray_launcher, "cluster_devices", lambda _: devices)
        with pytest.raises(TrainingError, match=r"torch sees no GPU where Ray assigned one: rank 0 on .* rank 1 on"):
            ray_launcher.run_training(config)
    finally:
        ray.shutdown()
    output = capsys.readouterr().err
    assert "attempt 1 ended after checkpoint step 0: TrainingError: torch sees no GPU" in output
    assert "attempt 2" not in output
