"""Checks of this GPU: libraries, agreement with the CPU, CUDA graphs, the memory probe and determinism."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata

import torch
from torch import Tensor

from benchmarks.gpu.stage import Stage, Workload, describe_error, make_workload, milliseconds, small_model
from benchmarks.measure import count_waits
from m2f.model.config import TimmBackboneConfig
from m2f.model.mask2former import build_model
from m2f.trainer.memory import probe as memory_probe

LIBRARIES = (
    *("torch", "triton", "torchvision", "timm", "transformers", "deepspeed", "pydantic", "numpy", "scipy"),
    *("opencv-python-headless", "pyarrow", "pycocotools", "safetensors"),
)
REQUIRED_MODULES = (
    *("m2f.trainer.worker", "m2f.trainer.engine.engine", "m2f.eval.inference.evaluator", "m2f.cluster.predict.predict"),
    *(
        "benchmarks.train_recorded",
        "benchmarks.peers.bench_train_step",
        "benchmarks.peers.bench_inference",
        "benchmarks.peers.bench_zero",
    ),
)
"""Modules that other steps import, and modules that users of this machine need."""
REPORT_COMMANDS = (("nvidia-smi",), ("nvcc", "--version"), ("free", "-g"), ("df", "-h", "/tmp", "/dev/shm"))


def machine(stage: Stage) -> dict[str, object]:
    """Report the machine, its library versions, and modules that cannot be imported."""
    for command in REPORT_COMMANDS:
        if shutil.which(command[0]) is not None:
            print(subprocess.run(command, capture_output=True, text=True).stdout, flush=True)
    versions: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    failures: dict[str, str] = {}
    for name in REQUIRED_MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:
            failures[name] = describe_error(error)
    facts: dict[str, object] = {"versions": versions, "imports that fail": failures, "cores": os.cpu_count()}
    if not stage.dry:
        gpu = torch.cuda.get_device_properties(stage.device)
        facts["GPU"] = f"{gpu.name}, {gpu.multi_processor_count} SM, {gpu.total_memory / 2**30:.0f} GiB"
        facts["cuDNN"], facts["NCCL"] = torch.backends.cudnn.version(), torch.cuda.nccl.version()
        facts["TF32"] = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    return facts


def parity(stage: Stage) -> dict[str, object]:
    """Compare one step in fp32 and bf16 on this device with fp32 on the CPU.

    Returns the relative errors of losses and gradients, and how often the host waits for the device.
    """
    torch.backends.cudnn.allow_tf32 = False
    size = stage.pick(256, 64)

    def run(precision: str, device: torch.device) -> tuple[Workload, Tensor, dict[str, Tensor]]:
        workload = make_workload(stage.config, 2, size, precision, device, objects=6)  # type: ignore[arg-type]
        losses = workload.module(workload.batch, workload.normalizers)
        losses.total.backward()
        gradients = {n: p.grad.float().cpu() for n, p in workload.module.named_parameters() if p.grad is not None}
        return workload, losses.terms.float().cpu(), gradients

    _, exact, expected = run("fp32", torch.device("cpu"))
    expected_gradients = torch.cat([gradient.flatten() for gradient in expected.values()])
    facts: dict[str, object] = {}
    for precision in ("fp32", "bf16_autocast"):
        workload, terms, gradients_by_name = run(precision, stage.device)
        found_gradients = torch.cat([gradients_by_name[name].flatten() for name in expected])
        facts[precision] = {
            "loss": f"{float((terms - exact).abs().max() / exact.abs().max()):.1e}",
            "gradient": f"{float((found_gradients - expected_gradients).norm() / expected_gradients.norm()):.1e}",
            "waits": count_waits(workload.backward, stage.device),
        }
    return facts


def graphs(stage: Stage) -> dict[str, object]:
    """Compare inference by CUDA graph replay with the eager forward pass, for alternating image sizes."""
    stage.need_gpu()
    from m2f.model.inference.cuda_graphs import ReplayedForward
    from m2f.model.inference.precision import deterministic_convolutions

    torch.manual_seed(0)
    model = build_model(stage.config, pretrained_backbone=False).to(stage.device).eval()
    facts: dict[str, object] = {}
    for name, use_bf16 in (("fp32", False), ("bf16", True)):
        replayed, max_error = ReplayedForward(model.forward), 0.0
        with (
            torch.inference_mode(),
            torch.autocast("cuda", torch.bfloat16, enabled=use_bf16),
            deterministic_convolutions(),
        ):
            for height, width in 5 * ((800, 1344), (640, 640), (512, 768)):
                pixels = torch.randn(1, 3, height, width, device=stage.device).to(memory_format=torch.channels_last)
                pairs = zip(replayed(pixels), model.forward(pixels), strict=True)
                max_error = max(max_error, *(float((a.float() - b.float()).abs().max()) for a, b in pairs))
            facts[name] = {
                "worst": f"{max_error:.1e}",
                "as it is": f"{milliseconds(lambda pixels=pixels: model.forward(pixels), stage.device)} ms",
                "replayed": f"{milliseconds(lambda pixels=pixels, run=replayed: run(pixels), stage.device)} ms",
                "recorded sizes": len(replayed._recordings),
            }
    return facts


def probe(stage: Stage) -> dict[str, object]:
    """Check the memory probe.

    It must report a batch that does not fit, and must not change weights, statistics or random numbers.
    """
    native = TimmBackboneConfig(name="resnet10t", norm="native", options={"channels": (16, 32, 48, 64)})
    workload = make_workload(replace(small_model(), backbone=native), 2, 64, "fp32", stage.device, objects=5)
    before = {name: tensor.clone() for name, tensor in workload.module.state_dict().items()}
    numbers = _random_state(stage)
    fits = memory_probe._fits(workload.module, workload.batch, 1)
    changed = [name for name, tensor in workload.module.state_dict().items() if not torch.equal(tensor, before[name])]
    facts: dict[str, object] = {
        "fits": fits,
        "changed by the probe": changed[:5],
        "random numbers kept": torch.equal(numbers, _random_state(stage)),
    }
    if not stage.dry:
        torch.cuda.set_per_process_memory_fraction(0.05)
        large = make_workload(stage.config, 8, 1024, "bf16_autocast", stage.device)
        facts["8 images of 1024 in 5 % of the GPU"] = memory_probe._fits(large.module, large.batch, 1)
        torch.cuda.set_per_process_memory_fraction(1.0)
    return facts


def _random_state(stage: Stage) -> Tensor:
    return torch.get_rng_state() if stage.dry else torch.cuda.get_rng_state(stage.device)


def determinism(stage: Stage) -> dict[str, object]:
    """Run the same step twice with deterministic algorithms and compare the gradients bit by bit."""

    def gradients() -> Tensor:
        workload = make_workload(stage.config, 2, stage.pick(256, 64), "bf16_autocast", stage.device, objects=6)
        workload.backward()
        return torch.cat([p.grad.flatten() for p in workload.module.parameters() if p.grad is not None])

    with _deterministic():
        equal = torch.equal(gradients(), gradients())
    return {"bit-equal gradients": equal}


@contextmanager
def _deterministic() -> Iterator[None]:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # must be set before the first matrix product on a GPU
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
