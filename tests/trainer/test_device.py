import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import m2f.trainer.device
import m2f.trainer.setup
import m2f.trainer.worker
from m2f.trainer.device import require_exclusive_device, select_device, shared_device_problem
from m2f.trainer.errors import TrainingError
from m2f.trainer.memory.allocator import enable_expandable_segments
from m2f.trainer.setup import prepare_device
from m2f.trainer.worker import process_group
from tests.trainer.tiny_job import Recorder


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["GPU-a of x", "GPU-b of x"], None),
        (["GPU-a of x", "GPU-a of y"], None),
        (["", ""], None),
        (["GPU-a of x", "GPU-b of x", "GPU-a of x"], r"ranks 0 and 2 share one GPU \(GPU-a of x\).*num_workers"),
    ],
)
def test_two_ranks_on_one_gpu_are_refused(names, problem):
    found = shared_device_problem(names)
    assert (found is None) == (problem is None)

    class TwoRanks:
        def gather(self, name):
            assert name == ""
            return names

    if problem is None:
        require_exclusive_device(torch.device("cpu"), TwoRanks())
    else:
        with pytest.raises(TrainingError, match=problem):
            require_exclusive_device(torch.device("cpu"), TwoRanks())


def test_rank_uses_the_gpu_of_its_local_rank(monkeypatch):
    selected = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert select_device() == torch.device("cuda", 0)
    assert selected == [0]
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(TrainingError, match=r"needs the GPU with index 1 .* torch sees only 1 .*; start fewer ranks"):
        select_device()


@pytest.mark.parametrize(("rank", "line"), [(0, "attention by a"), (1, "attention by a"), (0, None)])
def test_first_rank_reports_the_attention_kernels_in_use(rank, line, monkeypatch):
    checked, reporter = [], Recorder()
    monkeypatch.setattr(m2f.trainer.setup, "select_attention_backends", lambda device: checked.append(device) or line)
    ranks = SimpleNamespace(is_first=rank == 0, gather=lambda name: [name, "GPU-b of x"])
    assert prepare_device(ranks, reporter) == torch.device("cpu")
    assert checked == [torch.device("cpu")]
    assert reporter.events == ([("device", 0, "attention by a")] if line and rank == 0 else [])


@pytest.mark.parametrize(
    ("before", "added"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {}),
        ({"PYTORCH_ALLOC_CONF": ""}, {}),
    ],
)
def test_allocator_segments_are_expandable_by_default(before, added):
    environment = dict(before)
    enable_expandable_segments(environment)
    assert environment == before | added


@pytest.mark.skipif(not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="this torch does not tell")
def test_torch_applies_the_allocator_setting_after_import():
    """Ray imports torch before a rank's code runs, so the setting must still take effect after the import."""
    clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    command = [sys.executable, "-m", "tests.trainer.allocator_main"]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "expandable_segments:True"


@pytest.mark.parametrize(("device", "is_ended"), [("cuda", False), ("cpu", True)])
def test_nccl_group_is_not_destroyed_after_an_error(device, is_ended, monkeypatch):
    """Destroying it would wait for the other ranks, and the error would never be raised."""
    ended = []
    monkeypatch.setattr(m2f.trainer.worker.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(m2f.trainer.worker.dist, "init_process_group", lambda *arguments, **options: None)
    monkeypatch.setattr(m2f.trainer.worker, "_loopback_store", lambda *arguments: None)
    monkeypatch.setattr(m2f.trainer.worker, "_destroy_group", lambda: ended.append(True))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", os.environ.get("LOCAL_RANK", "0"))
    with pytest.raises(KeyError), process_group(torch.device(device), 1.0):
        raise KeyError("an error of this rank")
    assert bool(ended) == is_ended
    ended.clear()
    with process_group(torch.device(device), 1.0):
        pass
    assert ended == [True]
