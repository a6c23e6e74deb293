import io

from m2f.trainer.reporting import CommittedCheckpoint, LogReporter


def test_one_readable_line_per_report():
    out = io.StringIO()
    reporter = LogReporter(max_steps=1000, stream=out)
    reporter.metrics(
        20,
        {
            "loss/total": 31.25,
            "loss/class": 11.0,
            "loss/mask": 10.25,
            "loss/dice": 10.0,
            "grad_norm": 123.4,
            "lr": 1e-4,
            "images_per_s": 12.34,
            "data_wait_share": 0.031,
            "eta_s": 3661.0,
            "storage/read_mb": 4.25,
            "storage/cached_mb": 1.0,
            "storage/retries": 2.0,
            "system/gpu_memory_gb": 34.25,
            "system/gpu_image_gb": 1.875,
        },
    )
    reporter.checkpoint(CommittedCheckpoint(20, "runs/a/checkpoints/step_00000020"))
    reporter.event("skipped", 21, "the loss of img_7 is not finite")
    assert out.getvalue().splitlines() == [
        "step   20/1000  loss 31.2500 (class 11.0000, mask 10.2500, dice 10.0000)  grad 123  lr 0.0001"
        "  12.3 images/s  data wait 3 %  read 4.2 MB and 1.0 MB cached with 2 retries"
        "  GPU 34.2 GB, 1.88 GB an image  left 1:01:01",
        "step 20: checkpoint runs/a/checkpoints/step_00000020",
        "step 21: skipped: the loss of img_7 is not finite",
    ]
