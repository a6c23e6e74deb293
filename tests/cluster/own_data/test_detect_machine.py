import shutil
from pathlib import Path

import pytest

from m2f.cluster.own_data.choices import detect_machine


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, (2, 25.77)), ("1", (1, 25.77)), ("", (0, 0.0)), ("-1", (0, 0.0))]
)
def test_only_visible_gpus_count(visible, expected, tmp_path, monkeypatch):
    shutil.copy(Path(__file__).with_name("fake_nvidia_smi.sh"), tmp_path / "nvidia-smi")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = detect_machine()
    assert (machine.num_gpus, machine.gpu_gb) == pytest.approx(expected, abs=0.01)
