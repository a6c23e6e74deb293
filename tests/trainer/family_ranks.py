"""Scenario of test_family.py: one step of every member of the model family under ZeRO-3 and in plain torch.

Not a test module; `rank_main.py` runs it on every rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist

from m2f.data_pipeline.order.order import step_positions
from m2f.model.config import (
    BiFPNPixelDecoderConfig,
    EomtDecoderConfig,
    FaPNPixelDecoderConfig,
    FPNPixelDecoderConfig,
    LossConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    PilotConfig,
    PixelDecoderConfig,
    PmtDecoderConfig,
    SemanticFPNPixelDecoderConfig,
    StandardTransformerDecoderConfig,
    SwinBackboneConfig,
    TimmBackboneConfig,
    TransformerDecoderConfig,
    TransformerFPNPixelDecoderConfig,
    UpscalePixelDecoderConfig,
    ViTAdapterBackboneConfig,
)
from m2f.trainer.config import ZeroConfig
from m2f.trainer.engine.engine import Engine
from m2f.trainer.engine.queued_step import loss_terms
from m2f.trainer.ranks import Ranks
from m2f.trainer.telemetry.metrics import sum_over_ranks
from tests.trainer.engine_ranks import GLOBAL_BATCH, fresh_module, make_images, normalizers_of
from tests.waiting import PATIENCE_S

WIDTH = {"conv_dim": 16, "mask_dim": 16}
ENCODER = {"num_layers": 1, "num_heads": 2, "feedforward_dim": 16, "dropout": 0.0}
DECODER = {"num_queries": 8, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "feedforward_dim": 16, "dropout": 0.0}

FPN = FPNPixelDecoderConfig(**WIDTH)
BIFPN = BiFPNPixelDecoderConfig(**WIDTH, num_layers=1)
TRANSFORMER_FPN = TransformerFPNPixelDecoderConfig(**WIDTH, **ENCODER)


def masked(**settings) -> MaskedTransformerDecoderConfig:
    return MaskedTransformerDecoderConfig(**DECODER, **settings)


STANDARD = StandardTransformerDecoderConfig(**DECODER)
POINTS = LossConfig(num_points=64)

FAMILY = {
    "ms_deform_attn": (MSDeformAttnPixelDecoderConfig(**WIDTH, **ENCODER, num_points=2), masked(), POINTS),
    "fpn, cross, stride_32": (FPN, masked(attention="cross", features="stride_32"), POINTS),
    "semantic_fpn, smca, stride_16": (
        SemanticFPNPixelDecoderConfig(**WIDTH),
        masked(attention="smca", features="stride_16"),
        POINTS,
    ),
    "bifpn, mask_pooling, stride_8": (BIFPN, masked(attention="mask_pooling", features="stride_8"), POINTS),
    "fapn, naive_multi_scale, learnable": (
        FaPNPixelDecoderConfig(**WIDTH, offset_groups=2),
        masked(features="naive_multi_scale", queries="learnable"),
        POINTS,
    ),
    "transformer_fpn, zero, pre_norm, self-attention first": (
        TRANSFORMER_FPN,
        masked(queries="zero", pre_norm=True, cross_attention_first=False),
        POINTS,
    ),
    "fpn, smca, multi_scale, focal": (FPN, masked(attention="smca"), replace(POINTS, mask_loss="focal")),
    "fpn, standard, masks, focal": (
        FPN,
        STANDARD,
        replace(POINTS, matching="masks", supervision="masks", mask_loss="focal"),
    ),
    "transformer_fpn, standard, masks": (TRANSFORMER_FPN, STANDARD, replace(POINTS, supervision="masks")),
    "bifpn, mask_pooling, zero, masks": (
        BIFPN,
        masked(attention="mask_pooling", queries="zero"),
        replace(POINTS, matching="masks"),
    ),
}

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
VIT_WITH_QUERIES = TimmBackboneConfig(
    name="vit_small_patch14_reg4_dinov2", features="tokens", options={**VIT, "img_size": 64}
)
VIT_ADAPTER = ViTAdapterBackboneConfig(
    name="vit_small_patch16_dinov3_qkvb", options={**VIT, "depth": 4}, num_heads=4, stem_width=4, drop_path=0.0
)
HEADS = {
    "eomt": EomtDecoderConfig(num_queries=8, num_layers=1, annealing=((0, 1),)),
    "pmt": PmtDecoderConfig(num_queries=8, num_layers=1, annealing=((0, 1),)),
}
"""Decoders that require the backbone `VIT_WITH_QUERIES`."""
BACKBONES = {
    "ms_deform_attn": SwinBackboneConfig(embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8), drop_path=0.0),
    "fpn, smca, multi_scale, focal": TimmBackboneConfig(name="vit_small_patch14_dinov2", options=VIT),
    "fpn, standard, masks, focal": TimmBackboneConfig(
        name="hiera_small_abswin_256", options={"embed_dim": 16, "stages": (1, 1, 2, 1)}
    ),
    "transformer_fpn, standard, masks": TimmBackboneConfig(
        name="convnextv2_atto", options={"dims": (8, 16, 24, 32), "depths": (1, 2, 1, 1)}
    ),
    "bifpn, mask_pooling, zero, masks": VIT_ADAPTER,
}
"""Backbones of members whose pixel decoder another member combines with the ResNet of `make_job`."""


def family_agreement(make_job) -> dict:
    """Return loss and gradient norm of one step of four images: in plain torch, and sharded with checkpointing."""
    assert not untested_options()
    assert FAMILY.keys() >= BACKBONES.keys()
    ranks = Ranks(PATIENCE_S)
    zero = ZeroConfig(stage=3, param_persistence_threshold=0)
    job = make_job(global_batch=GLOBAL_BATCH, micro_batch=2, zero=zero)
    seen = {}
    for name, (pixel_decoder, transformer_decoder, loss) in FAMILY.items():
        parts = {"pixel_decoder": pixel_decoder, "transformer_decoder": transformer_decoder, "loss": loss}
        model = replace(job.model, backbone=BACKBONES.get(name, job.model.backbone), **parts)
        seen[name] = whole_and_sharded(job, model, ranks)
    for name, head in HEADS.items():
        parts = {"pixel_decoder": UpscalePixelDecoderConfig(), "transformer_decoder": head}
        model = replace(job.model, backbone=VIT_WITH_QUERIES, loss=POINTS, **parts)
        seen[name] = whole_and_sharded(job, model, ranks)
    model = replace(job.model, backbone=VIT_ADAPTER, freeze=("backbone.vit",))
    seen["ms_deform_attn, vit_adapter, frozen"] = whole_and_sharded(job, model, ranks)
    model = replace(job.model, pilots=PilotConfig(max_targets=2, mask_noise=0.2))
    seen["ms_deform_attn, pilots"] = whole_and_sharded(job, model, ranks)
    dist.barrier()
    return seen


def whole_and_sharded(job, model: ModelConfig, ranks: Ranks) -> list[dict[str, float]]:
    return [whole_step(replace(job, model=model)), sharded_step(replace(job, model=with_checkpointing(model)), ranks)]


def with_checkpointing(model: ModelConfig) -> ModelConfig:
    """Enable checkpointing in every part that supports it; ZeRO-3 then gathers the shards a second time."""
    parts = {"backbone": model.backbone, "pixel_decoder": model.pixel_decoder}
    supported = {name: part for name, part in parts.items() if hasattr(part, "checkpointing")}
    return replace(model, **{name: replace(part, checkpointing=True) for name, part in supported.items()})


def untested_options() -> set[object]:
    """Return decoder kinds and option values that no member of the family covers."""
    pixel_decoders, transformer_decoders, losses = zip(*FAMILY.values(), strict=True)
    tested = {type(config) for config in (*pixel_decoders, *transformer_decoders)}
    tested |= {UpscalePixelDecoderConfig, *map(type, HEADS.values())}
    available = {*get_args(PixelDecoderConfig), *get_args(TransformerDecoderConfig)}
    for cls, configs in ((MaskedTransformerDecoderConfig, transformer_decoders), (LossConfig, losses)):
        of_class = [vars(config) for config in configs if isinstance(config, cls)]
        for name, hint in get_type_hints(cls).items():
            if get_origin(hint) is Literal and name != "class_norm":
                available |= {(name, choice) for choice in get_args(hint)}
                tested |= {(name, values[name]) for values in of_class}
    return available - tested


def whole_step(job) -> dict[str, float]:
    batch = make_images(job.model, range(GLOBAL_BATCH))
    module = fresh_module(job)
    losses = module(batch, normalizers_of(job, [batch]))
    losses.total.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.requires_grad])
    return {"loss": losses.terms.sum().item(), "norm": norm.item()}


def sharded_step(job, ranks: Ranks) -> dict[str, float]:
    training = job.training
    engine = Engine(fresh_module(job), training, torch.device("cpu"))
    plan = step_positions(0, GLOBAL_BATCH, ranks.rank, ranks.world_size, training.micro_batch)
    batches = [make_images(job.model, positions) for positions in plan]
    normalizers = normalizers_of(job, batches, ranks)
    losses = [engine.accumulate(batch, normalizers) for batch in batches]
    result = engine.finish_step(1)
    assert result.applied
    return {"loss": sum_over_ranks(loss_terms(losses), ranks).total, "norm": result.grad_norm}
