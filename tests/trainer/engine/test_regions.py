"""Compiled regions: one graph per region, for any number of targets."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from m2f.cluster.recipe.config import RunConfig
from m2f.data_pipeline.config import DataConfig, DatasetConfig, MixtureItem, ScaleJitter
from m2f.data_pipeline.sources import SyntheticSource
from m2f.model.config import (
    LossConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    PilotConfig,
    TimmBackboneConfig,
)
from m2f.model.errors import ConfigError
from m2f.model.loss.criterion import count_normalizers
from m2f.model.mask2former import build_model
from m2f.model.segmenter import Segmenter
from m2f.trainer.config import TrainingConfig, ZeroConfig
from m2f.trainer.engine.compile import compile_regions
from m2f.trainer.engine.module import TrainingModule
from m2f.trainer.job import TrainJob
from m2f.trainer.memory.probe import largest_batch

QUERIES = 12
MODEL = ModelConfig(
    backbone=TimmBackboneConfig(name="resnet10t", options={"channels": (8, 16, 24, 32)}),
    pixel_decoder=MSDeformAttnPixelDecoderConfig(
        conv_dim=16, mask_dim=16, num_layers=1, num_heads=2, num_points=2, feedforward_dim=16, checkpointing=True
    ),
    transformer_decoder=MaskedTransformerDecoderConfig(
        num_queries=QUERIES, num_layers=3, hidden_dim=16, num_heads=2, feedforward_dim=16
    ),
    loss=LossConfig(num_points=64),
    num_classes=3,
)
DATA = DataConfig(train=(MixtureItem(dataset="train"),))
TRAINING = TrainingConfig(max_steps=1)
JOB = TrainJob(run_folder="run", model=MODEL, data=DATA, shards=("none",), training=TRAINING)


def step(module, targets):
    """Return the loss and gradients of two images with `targets` targets each."""
    job = replace(JOB, data=replace(DATA, augment=replace(DATA.augment, size=64)))
    batch = largest_batch(job, 2, targets)
    module.zero_grad()
    loss = module(batch, count_normalizers(batch.targets, QUERIES, MODEL.loss)).total
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in module.parameters()]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch inspects graph inputs
@pytest.mark.parametrize("pilots", [PilotConfig(), PilotConfig(max_targets=100, mask_noise=0.2)], ids=["", "pilots"])
def test_every_region_is_one_graph_for_any_number_of_targets(pilots):
    """With pilots, the decoder has one graph per padded number of pilots: here 8 and 16."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = replace(MODEL, pilots=pilots)
    module = TrainingModule(build_model(model, pretrained_backbone=False), model, 0, "fp32")
    names = list(module.state_dict())
    with torch.no_grad():  # away from pixel centres, where the gradient of bilinear sampling is discontinuous
        module.get_parameter("model.pixel_decoder.layers.0.attention.sampling_offsets.bias").add_(0.3)
    eager = [step(module, targets) for targets in (2, 5, 12)]
    graphs = CompileCounter()  # runs the captured graphs unchanged
    compile_regions(module.model, graphs)
    for (loss, gradients), targets in zip(eager, (2, 5, 12), strict=True):
        compiled_loss, compiled_gradients = step(module, targets)
        assert graphs.frame_count == len(Segmenter.regions) + (pilots.max_targets > 0 and targets > 8)
        # Inside a graph, deformable attention uses grid_sample instead of the eager CPU form.
        torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
        for compiled, expected in zip(compiled_gradients, gradients, strict=True):
            torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-5)
    assert list(module.state_dict()) == names


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(ConfigError, match=r"training\.compile .* training\.zero\.stage 0, 1 or 2; it is 3"):
        TrainingConfig(max_steps=1, compile=True, zero=ZeroConfig(stage=3))
    with pytest.raises(ConfigError, match=r"training\.compile .* data\.augment"):
        RunConfig(
            name="x",
            datasets={"train": DatasetConfig(shards="s", source=SyntheticSource())},
            data=replace(DATA, augment=ScaleJitter()),
            training=replace(TRAINING, compile=True),
        )
