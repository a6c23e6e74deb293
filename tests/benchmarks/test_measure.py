"""Results of benchmarks: no ratio unless the outputs agree, and a record of machine and software."""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.__main__ import ON_ANY_DEVICE, main
from benchmarks.measure import CPU, Measurement, Times, compare, time_interleaved
from benchmarks.memory import peak_growth
from benchmarks.peers import bench_inference, bench_train_step
from benchmarks.peers.bench_train_step import _product_milliseconds
from benchmarks.tables import Setting, json_lines, markdown, save
from m2f.model.structures import Predictions

RESULT = Measurement("step", "2 x 64", Times(10.0, (9.0, 11.0), 12.0), "peer", Times(25.0, (24.0, 26.0), 27.0), 1e-6)


@pytest.fixture
def setting():
    return replace(Setting.now(CPU, "copy 10 GB/s"), day="2026-11-23", hardware="Some (R) CPU @ 2.0 GHz")


def test_compare_requires_agreement():
    one, other = torch.ones(3), torch.tensor([1.0, 1.0, 1.1])
    with pytest.raises(AssertionError, match=r"case shape: ours and peer differ by 9.1e-02, more than 1.0e-02"):
        compare("case", "shape", lambda: [one], "peer", lambda: [other], 0.01, repeats=1)
    result = compare("case", "shape", lambda: [one], "peer", lambda: [other], 0.1, repeats=1, memory=True)
    assert result.error == pytest.approx(0.1 / 1.1)
    assert result.ours_waits is None


def test_agreement_is_checked_without_tf32_and_timing_uses_the_current_setting(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []

    def result():
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return [torch.ones(1)]

    current = (True, torch.backends.cuda.matmul.allow_tf32)
    compare("case", "shape", result, "peer", result, 0.0, repeats=1)
    assert seen == [(False, False)] * 2 + [current] * 2


class Noted(nn.Module):
    """Model that notes whether TF32 is allowed, and stops the benchmark at the second forward pass."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def normalise(self, images):
        return images

    def forward(self, images=None, *, pixel_values=None):
        self.seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        if len(self.seen) == 2:
            raise KeyError("both models have run")


@pytest.mark.parametrize(
    ("module", "compare_models"),
    [
        (bench_train_step, lambda: bench_train_step._workload(bench_train_step._Case(1, 64, CPU, repeats=1))),
        (bench_inference, lambda: bench_inference._case(1, (64, 64), CPU, repeats=1)),
    ],
    ids=["training step", "inference"],
)
def test_models_are_compared_without_tf32(module, compare_models, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(module, "twins", lambda: (Noted(seen), Noted(seen)))
    with pytest.raises(KeyError, match="both models have run"):
        compare_models()
    assert seen == 2 * [(False, False)]


def test_inference_is_measured_with_weights_cast_once_and_deterministic_convolutions():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, images):
            assert torch.backends.cudnn.deterministic
            return Predictions(self.layer(images), images, images)

    model = Model()
    assert bench_inference._product_forward(model, "bf16")(torch.zeros(1, 3)).class_logits.shape == (1, 2)
    assert model.layer.weight.dtype == torch.bfloat16


def test_model_benchmarks_do_not_need_packages_of_other_benchmarks():
    repository = Path(__file__).resolve().parents[2]
    modules = ["benchmarks.__main__", *(f"benchmarks.peers.bench_{name}" for name in ON_ANY_DEVICE)]
    command = [sys.executable, "tests/import_without.py", "boto3,webdataset,pycocotools,ray,mlflow", *modules]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_peak_memory_counts_tensors_that_exist_at_the_same_time():
    kept = []

    def run():
        first = torch.empty(2**20, dtype=torch.uint8)
        del first
        kept.append(torch.empty(3 * 2**20, dtype=torch.uint8))
        torch.empty(2**20, dtype=torch.uint8)

    assert peak_growth(run, CPU) == 4 / 1024


def test_both_sides_run_in_turn():
    calls, clock = [], iter(range(100))
    ours, peer = time_interleaved(lambda: calls.append("o"), lambda: calls.append("p"), 3, lambda: float(next(clock)))
    assert "".join(calls) == "opopop"
    assert ours == peer == Times(1000.0, (1000.0, 1000.0), 1000.0)


def test_times_have_median_quartiles_and_95th_percentile():
    seconds = [n / 1000 for n in range(1, 102)]
    times = Times.of(seconds)
    assert times.median == pytest.approx(1000 * statistics.median(seconds))
    assert times.quartiles == pytest.approx((26, 76))
    assert times.p95 == pytest.approx(96)
    assert times.per(2).quartiles == pytest.approx((13, 38))


def test_floor_counts_only_products_and_convolutions():
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 32, 3), torch.nn.Flatten(), torch.nn.Linear(32 * 62 * 62, 16))
    images = torch.randn(4, 8, 64, 64)
    assert _product_milliseconds(lambda: model(images).sum().backward(), CPU) > 0
    assert _product_milliseconds(lambda: images @ images, CPU) > 0
    assert _product_milliseconds(lambda: images.exp().sum(), CPU) == 0


def test_table_states_machine_and_software(setting):
    text = markdown([replace(RESULT, ours_gb=0.5, peer_gb=2.0, floor_ms=4.0, ours_waits=1, peer_waits=80)], setting)
    assert "2026-11-23, Some (R) CPU @ 2.0 GHz" in text
    assert torch.__version__ in text
    assert "TF32 o" in text
    assert "| step | 2 x 64 | 10.0 | peer | 25.0 | 2.50 | 0.50 | 2.00 | 0.25 | 40% | 1 / 80 | 1e-06 |" in text


def test_results_are_saved_under_day_and_hardware(setting, tmp_path):
    path = save([RESULT], setting, tmp_path / "results")
    assert path.name == "2026-11-23_some_r_cpu_2_0_ghz.md"
    assert path.read_text() == markdown([RESULT], setting) + "\n"
    first, result = map(json.loads, path.with_suffix(".jsonl").read_text().splitlines())
    assert first["commit"]
    assert (result["ours"]["median"], result["ratio"], result["floor_share"]) == (10.0, 2.5, None)
    assert json_lines([RESULT], setting) == path.with_suffix(".jsonl").read_text().strip()
    again = [save([], setting, path.parent).name for _ in range(2)]
    assert again == ["2026-11-23_some_r_cpu_2_0_ghz_2.md", "2026-11-23_some_r_cpu_2_0_ghz_3.md"]
    assert path.read_text() == markdown([RESULT], setting) + "\n"


def test_benchmarks_that_need_a_cpu_are_refused_on_other_devices(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "data", "heads", "--device", "cuda"])
    with pytest.raises(SystemExit):
        main()
    assert "--device is cuda; omit the benchmarks that only a CPU runs: data" in capsys.readouterr().err
