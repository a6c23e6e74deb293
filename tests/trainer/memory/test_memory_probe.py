from dataclasses import replace

import pytest
import torch

import m2f.model.backbones.batch_norms
import m2f.trainer.engine.module
from m2f.data_pipeline.config import DataConfig, LargeScaleJitter, MixtureItem, ScaleJitter, ShortestEdgeCrop
from m2f.model.config import (
    LossConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    TimmBackboneConfig,
)
from m2f.model.mask2former import build_model
from m2f.trainer.config import TrainingConfig
from m2f.trainer.engine.module import TrainingModule
from m2f.trainer.errors import OutOfMemoryError
from m2f.trainer.job import TrainJob
from m2f.trainer.memory.probe import _fits, largest_batch, largest_shape, largest_that_fits, probe_memory
from m2f.trainer.memory.shortage import is_out_of_memory

MODEL = ModelConfig(
    backbone=TimmBackboneConfig(name="resnet10t", norm="group", options={"channels": (8, 16, 24, 32)}),
    pixel_decoder=MSDeformAttnPixelDecoderConfig(
        conv_dim=16, mask_dim=16, num_layers=1, num_heads=2, num_points=2, feedforward_dim=16
    ),
    transformer_decoder=MaskedTransformerDecoderConfig(
        num_queries=8, num_layers=1, hidden_dim=16, num_heads=2, feedforward_dim=16
    ),
    loss=LossConfig(num_points=64),
    num_classes=3,
)
JOB = TrainJob(
    run_folder="run",
    model=MODEL,
    data=DataConfig(train=(MixtureItem(dataset="train"),), augment=LargeScaleJitter(size=64)),
    shards=("none",),
    training=TrainingConfig(max_steps=1, global_batch=8, micro_batch=8),
)


def fits_up_to(images):
    return lambda size: size <= images


@pytest.mark.parametrize(("room", "found"), [(8, 8), (7, 4), (3, 2), (1, 1)])
def test_the_micro_batch_is_halved_until_it_fits(room, found):
    assert largest_that_fits(fits_up_to(room), 8) == found


def test_a_single_image_that_does_not_fit_is_an_error():
    with pytest.raises(OutOfMemoryError, match="before the first step with a single image"):
        largest_that_fits(fits_up_to(0), 8)


@pytest.mark.parametrize(
    ("augment", "shape"),
    [
        (LargeScaleJitter(size=640), (640, 640)),
        (ShortestEdgeCrop(shortest_edges=(512,), max_size=2048, crop=(512, 1024)), (512, 1024)),
        (ScaleJitter(), (1344, 1344)),
    ],
)
def test_largest_shape_covers_every_augmentation(augment, shape):
    assert largest_shape(augment) == shape


def test_probe_computes_a_whole_step_and_restores_the_state(monkeypatch):
    torch.manual_seed(0)
    module = TrainingModule(build_model(MODEL, pretrained_backbone=False), MODEL, 0, "fp32")
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    batch = largest_batch(JOB, 2, targets=100)
    assert (batch.images.shape, batch.targets.valid.shape) == ((2, 3, 64, 64), (2, 8))
    assert batch.targets.id_maps.unique().tolist() == list(range(1, 9))
    assert _fits(module, batch, reserved_bytes=1000)

    def raise_out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(m2f.trainer.engine.module, "compute_losses", raise_out_of_memory)
    assert not _fits(module, batch, reserved_bytes=1000)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("norm", ["native", "sync_batch"])
def test_probe_leaves_norms_unchanged_and_runs_no_collective(norm, monkeypatch):
    model = replace(MODEL, backbone=replace(MODEL.backbone, norm=norm))
    module = TrainingModule(build_model(model, pretrained_backbone=False), model, 0, "fp32")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert any(name.endswith("num_batches_tracked") for name in before)
    monkeypatch.setattr(m2f.model.backbones.batch_norms.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(m2f.model.backbones.batch_norms.dist, "get_world_size", lambda: 2)

    def wait(*arguments, **options):
        raise AssertionError("the probe waits for the other ranks")

    monkeypatch.setattr(m2f.model.backbones.batch_norms.dist, "all_reduce", wait)
    assert _fits(module, largest_batch(JOB, 2, targets=3), reserved_bytes=0)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize(
    ("text", "is_full"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(...)`", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_out_of_memory_errors_of_cuda_libraries_are_recognised(text, is_full, monkeypatch):
    assert is_out_of_memory(RuntimeError(text)) == is_full
    assert not is_out_of_memory(ValueError(text))
    module = TrainingModule(build_model(MODEL, pretrained_backbone=False), MODEL, 0, "fp32")

    def fail(*arguments):
        raise RuntimeError(text)

    monkeypatch.setattr(m2f.trainer.engine.module, "compute_losses", fail)
    if is_full:
        assert not _fits(module, largest_batch(JOB, 1, targets=1), reserved_bytes=0)
    else:
        with pytest.raises(RuntimeError, match="CUDA error"):
            _fits(module, largest_batch(JOB, 1, targets=1), reserved_bytes=0)


def test_id_maps_of_many_segments_have_16_bits():
    queries = replace(MODEL.transformer_decoder, num_queries=300)
    batch = largest_batch(replace(JOB, model=replace(MODEL, transformer_decoder=queries)), 1, targets=280)
    assert batch.targets.id_maps.dtype == torch.int16
    assert batch.targets.id_maps.max() == 280


def test_on_cpu_nothing_is_probed():
    assert probe_memory(None, JOB, None, torch.device("cpu"), None, None) is JOB


def test_recipe_in_checkpoints_states_the_smaller_micro_batch():
    job = replace(JOB, recipe="name: run\ntraining:\n  max_steps: 1\n  micro_batch: 8\n").with_micro_batch(2)
    assert job.training.micro_batch == 2
    assert job.recipe == "name: run\ntraining:\n  max_steps: 1\n  micro_batch: 2\n"
    assert JOB.with_micro_batch(2).recipe == ""
