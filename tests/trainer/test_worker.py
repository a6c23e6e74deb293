import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from m2f.model.errors import ConfigError
from m2f.trainer.config import CheckpointConfig
from m2f.trainer.errors import TrainingError
from m2f.trainer.ranks import Ranks, StepFacts
from m2f.trainer.worker import process_group

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what the code sets
        monkeypatch.delenv(name)


@pytest.fixture
def ranks(no_launcher):
    with process_group(torch.device("cpu"), timeout_s=30.0):
        yield Ranks(timeout_s=30.0)


def test_partial_launcher_environment_is_refused(no_launcher, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(TrainingError, match="has RANK, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT; set all"),
        process_group(torch.device("cpu"), 1.0),
    ):
        pass


def test_without_a_launcher_the_process_is_the_only_rank(ranks):
    assert (ranks.rank, ranks.world_size, ranks.is_first) == (0, 1, True)
    assert os.environ["LOCAL_RANK"] == "0"
    facts = StepFacts(num_masks=3.0, class_weight_sum=0.1, drain=1.0)
    assert ranks.exchange(facts) == facts
    assert ranks.gather("a") == ["a"]
    assert ranks.run_on_rank0(lambda: 7) == 7


def test_user_error_keeps_its_type(ranks):
    def mistake():
        raise ConfigError("data.train is empty")

    with pytest.raises(ConfigError, match="is empty"):
        ranks.run_on_all(mistake)


def test_other_errors_name_the_rank(ranks):
    def bug():
        raise KeyError("missing")

    with pytest.raises(TrainingError, match="on all ranks: rank 0: KeyError: 'missing'"):
        ranks.run_on_rank0(bug)


@pytest.mark.parametrize("setting", ["every_steps", "keep"])
def test_checkpoint_settings_must_be_positive(setting):
    with pytest.raises(ConfigError, match=rf"CheckpointConfig: {setting} is 0"):
        CheckpointConfig(**{setting: 0})


def test_single_machine_run_listens_only_on_loopback(ranks):
    listening = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


@pytest.mark.slow
def test_one_process_can_train_twice(no_launcher, training_shards, tmp_path):
    repository = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "tests.trainer.train_twice_main", str(tmp_path), str(training_shards)]
    done = subprocess.run(
        command,
        cwd=repository,
        env=os.environ | {"PYTHONPATH": repository},
        check=False,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
