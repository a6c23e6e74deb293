import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.telemetry.numbers import RankNumbers
from m2f.trainer.telemetry.rank_stats import measure_rank, node_uses, rank_spread, slow_ranks, system_use
from m2f.trainer.telemetry.trace import Trace
from tests.trainer.step_metrics import METRICS
from tests.waiting import PATIENCE_S


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_killed_process_loses_no_line(tmp_path):
    command = [sys.executable, Path(__file__).with_name("killed_tracer.py"), tmp_path, "100"]
    killed = subprocess.run(command, capture_output=True, timeout=PATIENCE_S)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [line["step"] for line in read_lines(tmp_path / "traces/now/rank_0003.jsonl")] == list(range(100))


def test_a_trace_has_bounded_size_and_keeps_the_newest_lines(tmp_path):
    trace = Trace(Storage(), str(tmp_path), "now", 0, max_bytes=1000)
    for step in range(200):
        trace.write({"step": step})
    trace.close()
    older, newer = (read_lines(tmp_path / "traces/now" / name) for name in ("rank_0000.1.jsonl", "rank_0000.jsonl"))
    steps = [line["step"] for line in older + newer]
    assert steps == list(range(steps[0], 200))
    assert sum(path.stat().st_size for path in (tmp_path / "traces/now").iterdir()) < 2200


def test_a_trace_of_a_run_in_a_bucket_is_uploaded(monkeypatch, tmp_path):
    stored = {}

    class Bucket:
        def put_file(self, url, path):
            stored[url] = path.read_text()

    trace = Trace(Bucket(), "s3://box/run", "now", 1)
    trace.write({"step": 1})
    trace.close()
    assert list(stored) == ["s3://box/run/traces/now/rank_0001.jsonl"]
    assert json.loads(stored["s3://box/run/traces/now/rank_0001.jsonl"])["step"] == 1


def test_a_full_file_is_uploaded_once(monkeypatch):
    uploads = []

    class Bucket:
        def put_file(self, url, path):
            uploads.append((path.name, path.read_text()))

    trace = Trace(Bucket(), "s3://box/run", "now", 1, max_bytes=150)
    for step in range(4):
        trace.write({"step": step, "text": "x" * 60})  # two lines fill a file
        trace._upload()
    trace.close()
    contents = [content for name, content in uploads if name == "rank_0001.1.jsonl"]
    assert len(contents) == len(set(contents)) == 2


def test_full_disk_stops_only_the_trace(tmp_path, monkeypatch, caplog):
    trace = Trace(Storage(), str(tmp_path), "now", 0)
    trace.write({"step": 1})

    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("m2f.trainer.telemetry.trace.os.write", refuse)
    trace.write({"step": 2})
    trace.write({"step": 3})
    trace.close()
    assert caplog.text.count("No space left on device") == 1


def rank_numbers(rank, data_s=0.1, forward_s=1.0, host="a"):
    return RankNumbers(
        rank=rank, host=host, step_s=2.0, data_s=data_s, forward_s=forward_s, exchange_s=0.0, process_gb=1.0 + rank,
        cpu_percent=50.0, memory_percent=20.0, disk_free_gb=5.0,
    )  # fmt: skip


def test_numbers_of_all_ranks_are_summarised():
    numbers = [rank_numbers(0), rank_numbers(1, forward_s=2.1, host="b"), rank_numbers(2)]
    spread, system = rank_spread(numbers, slow=0), system_use(numbers)
    assert (spread.count, spread.slowest) == (3, 1)
    assert spread.slowest_over_median == pytest.approx(2.0)
    assert system.process_gb == 3.0
    assert system.gpu_percent is None


def test_every_machine_has_its_own_numbers():
    numbers = [rank_numbers(0), rank_numbers(1, host="b"), replace(rank_numbers(2), cpu_percent=70.0)]
    first, second = node_uses(numbers)
    assert (first.host, first.cpu_percent, first.process_gb) == ("a", 60.0, 4.0)
    assert (second.host, second.process_gb, second.gpu_percent) == ("b", 2.0, None)
    values = replace(METRICS, nodes=(first, second)).values()
    assert values["system/a/cpu_percent"] == 60.0
    assert values["system/b/disk_free_gb"] == 5.0
    assert not [name for name in values if name.startswith(("system/a/gpu", "system/b/gpu")) or name.endswith("host")]


def test_memory_per_image_is_derived_from_the_peak_of_a_micro_batch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 9e9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    numbers = measure_rank(0, 1, {}, 4, "s3://bucket/run")
    assert (numbers.gpu_memory_gb, numbers.gpu_image_gb) == (9.0, 2.0)
    other = replace(numbers, rank=1, gpu_memory_gb=10.0, gpu_image_gb=2.25)
    system = system_use([numbers, other])
    assert (system.gpu_memory_gb, system.gpu_image_gb) == (10.0, 2.25)


def test_rank_is_slow_if_its_own_work_takes_much_longer_than_the_median():
    numbers = [rank_numbers(0), rank_numbers(1, data_s=0.4), rank_numbers(2, forward_s=1.6), rank_numbers(3)]
    assert [str(found) for found in slow_ranks(numbers)] == [
        "rank 1 on a spends 0.40 s per step waiting for data, the median rank 0.10 s",
        "rank 2 on a spends 1.60 s per step on forward passes, the median rank 1.00 s",
    ]
    assert slow_ranks([rank_numbers(0), rank_numbers(1)]) == []
