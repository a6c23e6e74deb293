import pytest

from m2f.cluster.own_data.choices import detect_machine

NVIDIA_SMI = """#!/bin/sh
for word in "$@"; do
  case "$word" in --id=*) echo 24576; exit;; esac
done
printf '81920\\n24576\\n'
"""
"""Lists two GPUs, or the second one if `--id` selects it."""


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, (2, 25.77)), ("1", (1, 25.77)), ("", (0, 0.0)), ("-1", (0, 0.0))]
)
def test_only_visible_gpus_count(visible, expected, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = detect_machine()
    assert (machine.num_gpus, machine.gpu_gb) == pytest.approx(expected, abs=0.01)
