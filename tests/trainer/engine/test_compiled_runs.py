"""Complete runs with a compiled model: losses and checkpoint names of an uncompiled run, and one graph per region."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import m2f
from m2f.data_pipeline.config import DataConfig, MixtureItem
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.config import ModelConfig
from m2f.model.segmenter import Segmenter
from m2f.trainer.config import TrainingConfig
from m2f.trainer.engine.compile import compile_regions, keep_compiled_code
from m2f.trainer.errors import TrainingError
from m2f.trainer.job import TrainJob
from m2f.trainer.telemetry.phases import PhaseClock
from m2f.trainer.telemetry.watchdog import COMPILE_S, Watchdog

GRAPHS = pytest.param(("compiled", 1), id="graphs", marks=pytest.mark.slow)
KERNELS = pytest.param(("compiled_by_inductor", 2), id="kernels", marks=[pytest.mark.soak, pytest.mark.timeout(1800)])


@pytest.fixture(scope="module", params=[GRAPHS, KERNELS])
def runs(request, launcher, training_shards):
    scenario, ranks = request.param
    launcher.run_successfully(scenario, ranks, timeout_s=1780)
    return launcher.result(scenario)


def test_compiled_run_has_the_losses_of_an_uncompiled_run(runs):
    eager, compiled = runs["eager"]["losses"], runs["stopped"]["losses"] | runs["resumed"]["losses"]
    assert list(eager) == list(compiled)
    assert compiled != eager
    for step, loss in compiled.items():
        assert loss == pytest.approx(eager[step], rel=1e-4 if int(step) <= 10 else 1e-2), step  # rounding accumulates


def test_every_region_is_one_graph_however_many_targets_there_are(runs):
    assert len(set(runs["targets"])) > 3
    assert runs["graphs"] == [len(Segmenter.regions), len(Segmenter.regions)]


def test_checkpoints_have_the_names_of_an_uncompiled_model(runs, launcher):
    assert runs["resumed"]["events"][0][0] == "resumed"
    folders = launcher.folder.glob("compiled_by_*/*/checkpoints")
    newest = [max(folder.glob("step_*")) for folder in folders if folder.parent.name in ("eager", "parts")]
    names = {frozenset(safe_open(folder / "weights.safetensors", "pt").keys()) for folder in newest}
    assert len(newest) >= 2
    assert len(names) == 1


@pytest.mark.parametrize("runs", [KERNELS], indirect=True)
def test_compiled_run_resumes_bit_identically_also_in_16_bits(runs):
    assert runs["stopped"]["losses"] | runs["resumed"]["losses"] == runs["whole"]["losses"]
    for precision in ("bf16_autocast", "bf16"):
        losses = runs[f"{precision} compiled"]["losses"]
        assert len(losses) == 4
        assert losses == pytest.approx(runs[precision]["losses"], rel=0.02)


def test_error_for_a_missing_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(TrainingError, match=r"compile needs a C.* compiler \(.* to use another\).*apt-get install"):
        compile_regions(torch.nn.Module())


def test_region_that_inductor_cannot_compile_runs_uncompiled(monkeypatch):
    class Model(torch.nn.Module):
        regions = ("part",)

        def __init__(self) -> None:
            super().__init__()
            self.part = torch.nn.Linear(2, 2)

    def fail(*args, **kwargs):
        raise RuntimeError("no kernel for this graph")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    monkeypatch.setattr("m2f.trainer.engine.compile.find_compiler", lambda device: "g++")
    model, tokens = Model(), torch.ones(1, 2)
    expected = torch.nn.functional.linear(tokens, model.part.weight, model.part.bias)
    with torch._dynamo.config.patch(suppress_errors=False):  # restores the value that `compile_regions` sets
        compile_regions(model)
        assert torch.equal(model.part(tokens), expected)


COMPILE_A_REGION = """
import os
import torch
from torch._dynamo.utils import counters
from m2f.trainer.engine.compile import compile_regions, keep_compiled_code
class Model(torch.nn.Module):
    regions = ("part",)
    def __init__(self):
        super().__init__()
        self.part = torch.nn.Linear(2, 2)
keep_compiled_code(os.environ)
model = Model()
compile_regions(model)
model.part(torch.ones(1, 2)).sum().backward()
found = counters["aot_autograd"] + counters["inductor"]
print(found["autograd_cache_miss"] + found["fxgraph_cache_miss"], found["autograd_cache_hit"])
"""


@pytest.mark.slow
def test_second_process_finds_the_compiled_code_of_the_first(tmp_path):
    settings = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(m2f.__file__).parents[1])}
    (cold_misses, cold_hits), (warm_misses, warm_hits) = (
        map(int, subprocess.check_output([sys.executable, "-c", COMPILE_A_REGION], env=environment, text=True).split())
        for _ in range(2)
    )
    assert cold_misses > cold_hits == 0
    assert warm_hits > warm_misses == 0
    assert (tmp_path / ".cache/m2f/compiled").is_dir()


def test_compile_cache_of_the_user_is_kept_and_an_unwritable_one_is_not_set(tmp_path):
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "own")}
    keep_compiled_code(environment)
    assert environment == {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "own")}
    (tmp_path / ".cache").write_text("not a folder")
    environment = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        keep_compiled_code(environment)
    assert environment == {}


@pytest.mark.parametrize(
    ("compiled", "step", "phase", "seconds"),
    [
        (False, 0, "forward", 300.0),
        (True, 0, "forward", 300.0 + COMPILE_S),
        (True, 1, "forward", 300.0),
        (True, 0, "checkpoint", 300.0 + 3600.0),
    ],
)
def test_compilation_is_not_a_stall(compiled, step, phase, seconds):
    clock = PhaseClock()
    clock.step = step
    training = TrainingConfig(max_steps=1, compile=compiled)
    job = TrainJob(
        run_folder="run",
        model=ModelConfig(),
        data=DataConfig(train=(MixtureItem(dataset="d"),)),
        shards=(),
        training=training,
    )
    watchdog = Watchdog(clock, None, Storage(), job, "attempt", None)
    assert watchdog._phase_limit_s(phase) == seconds
