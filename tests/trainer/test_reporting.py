import errno
import io
from dataclasses import replace

from m2f.trainer.reporting import CommitReport, CommittedCheckpoint, LogReporter, Notice, RankReport, StepReport
from m2f.trainer.telemetry.numbers import RankNumbers
from tests.trainer.step_metrics import METRICS

RANK = RankNumbers(
    rank=1,
    host="a",
    step_s=1.0,
    data_s=0.1,
    forward_s=0.5,
    exchange_s=0.0,
    process_gb=2.0,
    cpu_percent=10.0,
    memory_percent=20.0,
    disk_free_gb=30.0,
)


def test_every_event_except_rank_reports_is_one_readable_line():
    out = io.StringIO()
    reporter = LogReporter(max_steps=1000, stream=out)
    on_gpu = replace(METRICS, system=replace(METRICS.system, gpu_memory_gb=34.25, gpu_image_gb=1.875))
    reporter.report(RankReport(20, RANK))
    reporter.report(StepReport(20, on_gpu))
    reporter.report(CommitReport(CommittedCheckpoint(20, "runs/a/checkpoints/step_00000020")))
    reporter.report(Notice("skipped", 21, "the loss of img_7 is not finite"))
    assert out.getvalue().splitlines() == [
        "step   20/1000  loss 31.2500 (class 11.0000, mask 10.2500, dice 10.0000)  grad 123  lr 0.0001"
        "  12.3 images/s  data wait 3 %  read 4.2 MB and 1.0 MB cached with 2 retries"
        "  GPU 34.2 GB, 1.88 GB per image  left 1:01:01",
        "step 20: checkpoint runs/a/checkpoints/step_00000020",
        "step 21: skipped: the loss of img_7 is not finite",
    ]


class FullDisk(io.StringIO):
    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_behind_the_log_is_reported_once_and_ends_nothing(monkeypatch, capsys):
    monkeypatch.setattr("m2f.data_pipeline.printable._INCOMPLETE", set())
    reporter = LogReporter(max_steps=1000, stream=FullDisk())
    for step in (20, 40):
        reporter.report(StepReport(step, METRICS))
    message = (
        "lines are missing in stdout, because its disk or terminal refuses them ([Errno 28] No space left on device)"
    )
    assert capsys.readouterr().err == f"{message}\n"


def test_the_names_of_stored_metrics_do_not_change():
    """Existing MLflow runs and dashboards use these names."""
    system = replace(METRICS.system, gpu_memory_gb=1.0, gpu_image_gb=1.0, gpu_percent=1.0)
    assert sorted(replace(METRICS, system=system, mfu=0.4).values()) == [
        "data_wait_share",
        "eta_s",
        "grad_norm",
        "images",
        "images_per_s",
        "loss/class",
        "loss/dice",
        "loss/mask",
        "loss/total",
        "lr",
        "mfu",
        "ranks/count",
        "ranks/slow",
        "ranks/slowest",
        "ranks/slowest_over_median",
        "skipped_steps",
        "step_time_s",
        "storage/cache_hits",
        "storage/cached_mb",
        "storage/read_mb",
        "storage/requests",
        "storage/retries",
        "storage/written_mb",
        "system/cpu_percent",
        "system/disk_free_gb",
        "system/gpu_image_gb",
        "system/gpu_memory_gb",
        "system/gpu_percent",
        "system/memory_percent",
        "system/process_gb",
    ]
    assert not {"mfu", "system/gpu_percent"} & METRICS.values().keys()
    assert "gpu_percent" not in RANK.values()
