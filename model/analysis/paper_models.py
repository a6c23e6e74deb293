"""Models of known size: rows of the Mask2Former paper with its printed numbers, and models of EoMT, PMT and DINOv3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from m2f.model.config import (
    BackboneConfig,
    BiFPNPixelDecoderConfig,
    EomtDecoderConfig,
    FaPNPixelDecoderConfig,
    FPNPixelDecoderConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    PixelDecoderConfig,
    PmtDecoderConfig,
    SemanticFPNPixelDecoderConfig,
    StandardTransformerDecoderConfig,
    SwinBackboneConfig,
    TimmBackboneConfig,
    TransformerFPNPixelDecoderConfig,
    UpscalePixelDecoderConfig,
    ViTAdapterBackboneConfig,
)

R50 = TimmBackboneConfig(name="resnet50")
R101 = TimmBackboneConfig(name="resnet101")
SWIN_T = SwinBackboneConfig()
SWIN_S = SwinBackboneConfig(depths=(2, 2, 18, 2))
SWIN_B = SwinBackboneConfig(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=12)
SWIN_L = SwinBackboneConfig(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=12)
"""The paper's six backbones."""

COCO_CLASSES, ADE_CLASSES = 80, 150
"""Classes of COCO instance segmentation and of ADE20K, which set the size of the class head."""


@dataclass(frozen=True, kw_only=True)
class PaperModel:
    """One row of a table."""

    name: str
    table: str
    """Tables of the Mask2Former paper that contain the row; or EoMT, PMT or DINOv3."""
    config: ModelConfig
    size: tuple[int, int] | None = None
    """Input (height, width) in pixels; None for the mean over images of COCO."""
    semantic: bool = False
    """Whether the FLOPs include semantic inference."""
    parameters: float | None = None
    """Parameters in millions, as printed."""
    flops: float | None = None
    """Multiply-adds in billions (10^9), as printed."""


def paper_models() -> tuple[PaperModel, ...]:
    """Return all rows, in the order of the tables."""
    mask2former = (*_coco(), *_decoder_variants(), *_pixel_decoders(), *_query_counts(), *_maskformer(), *_ade20k())
    return (*mask2former, *_eomt(), *_pmt(), *_dinov3())


def _coco() -> Iterator[PaperModel]:
    backbones: tuple[tuple[str, BackboneConfig, int, int, int], ...] = (
        ("R50", R50, 100, 44, 226),
        ("R101", R101, 100, 63, 293),
        ("Swin-T", SWIN_T, 100, 47, 232),
        ("Swin-S", SWIN_S, 100, 69, 313),
        ("Swin-B", SWIN_B, 100, 107, 466),
        ("Swin-L, 200 queries", SWIN_L, 200, 216, 868),
    )
    for name, backbone, queries, parameters, flops in backbones:
        decoder = MaskedTransformerDecoderConfig(num_queries=queries)
        config = ModelConfig(backbone=backbone, transformer_decoder=decoder, num_classes=COCO_CLASSES)
        yield PaperModel(name=name, table="I, III", config=config, parameters=parameters, flops=flops)


def _decoder_variants() -> Iterator[PaperModel]:
    masked = MaskedTransformerDecoderConfig()
    variants = (
        ("zero-initialised queries", "4b, Xb", replace(masked, queries="zero"), 226),
        ("learnable queries without supervision", "Xb", replace(masked, queries="learnable"), 226),
        ("self-attention first", "4b", replace(masked, cross_attention_first=False), 226),
        ("with dropout", "4b", replace(masked, dropout=0.1), 226),
        ("cross-attention", "4c", replace(masked, attention="cross"), 213),
        ("SMCA", "4c", replace(masked, attention="smca"), 213),
        ("mask pooling", "4c", replace(masked, attention="mask_pooling"), 217),
        ("single scale 1/32", "4d", replace(masked, features="stride_32"), 218),
        ("single scale 1/16", "4d", replace(masked, features="stride_16"), 222),
        ("single scale 1/8", "4d", replace(masked, features="stride_8"), 239),
        ("naive multi-scale", "4d", replace(masked, features="naive_multi_scale"), 247),
    )
    for name, table, decoder, flops in variants:
        config = ModelConfig(transformer_decoder=decoder, num_classes=COCO_CLASSES)
        yield PaperModel(name=f"R50, {name}", table=table, config=config, flops=flops)


def _pixel_decoders() -> Iterator[PaperModel]:
    variants: tuple[tuple[str, str, PixelDecoderConfig, int | None], ...] = (
        ("FPN", "4e", FPNPixelDecoderConfig(), 195),
        ("Semantic FPN", "4e", SemanticFPNPixelDecoderConfig(), 258),
        ("FaPN", "4e", FaPNPixelDecoderConfig(), None),
        ("BiFPN", "4e", BiFPNPixelDecoderConfig(), 204),
        ("transformer encoder and FPN", "XI d", TransformerFPNPixelDecoderConfig(), None),
    )
    for name, table, pixel_decoder, flops in variants:
        config = ModelConfig(pixel_decoder=pixel_decoder, num_classes=COCO_CLASSES)
        yield PaperModel(name=f"R50, {name}", table=table, config=config, flops=flops)


def _query_counts() -> Iterator[PaperModel]:
    for queries, flops in ((50, 217), (200, 246), (300, 265), (1000, 405)):
        decoder = MaskedTransformerDecoderConfig(num_queries=queries)
        config = ModelConfig(transformer_decoder=decoder, num_classes=COCO_CLASSES)
        yield PaperModel(name=f"R50, {queries} queries", table="Xa", config=config, flops=flops)


def _maskformer() -> Iterator[PaperModel]:
    encoder, fpn = TransformerFPNPixelDecoderConfig(), FPNPixelDecoderConfig()
    on_coco: tuple[tuple[str, BackboneConfig, PixelDecoderConfig, int, int], ...] = (
        ("R50", R50, encoder, 45, 181),
        ("R101", R101, encoder, 64, 248),
        ("Swin-T", SWIN_T, fpn, 42, 179),
        ("Swin-S", SWIN_S, fpn, 63, 259),
        ("Swin-B", SWIN_B, fpn, 102, 411),
        ("Swin-L", SWIN_L, fpn, 212, 792),
    )
    for name, backbone, pixel_decoder, parameters, flops in on_coco:
        config = ModelConfig(
            backbone=backbone,
            pixel_decoder=pixel_decoder,
            transformer_decoder=StandardTransformerDecoderConfig(),
            num_classes=COCO_CLASSES,
        )
        yield PaperModel(name=f"MaskFormer {name}", table="I", config=config, parameters=parameters, flops=flops)


def _ade20k() -> Iterator[PaperModel]:
    """Yield the rows of semantic segmentation: one input size, and FLOPs that include the sum over queries."""
    rows: tuple[tuple[str, BackboneConfig, int, int, int], ...] = (
        ("R50", R50, 512, 44, 71),
        ("R101", R101, 512, 63, 90),
        ("Swin-T", SWIN_T, 512, 47, 74),
        ("Swin-S", SWIN_S, 512, 69, 98),
        ("Swin-B", SWIN_B, 640, 107, 223),
        ("Swin-L", SWIN_L, 640, 215, 403),
    )
    for name, backbone, side, parameters, flops in rows:
        config = ModelConfig(backbone=backbone, num_classes=ADE_CLASSES)
        yield _ade20k_row(name, config, side, parameters, flops)
    config = ModelConfig(backbone=SWIN_L, pixel_decoder=FaPNPixelDecoderConfig(), num_classes=ADE_CLASSES)
    yield _ade20k_row("Swin-L, FaPN", config, 640, 217, None)
    maskformers: tuple[tuple[str, BackboneConfig, int, int, int], ...] = (
        ("R50", R50, 512, 41, 53),
        ("R101", R101, 512, 60, 73),
        ("Swin-T", SWIN_T, 512, 42, 55),
        ("Swin-S", SWIN_S, 512, 63, 79),
        ("Swin-B", SWIN_B, 640, 102, 195),
        ("Swin-L", SWIN_L, 640, 212, 375),
    )
    for name, backbone, side, parameters, flops in maskformers:
        config = ModelConfig(
            backbone=backbone,
            pixel_decoder=FPNPixelDecoderConfig(),
            transformer_decoder=StandardTransformerDecoderConfig(),
            num_classes=ADE_CLASSES,
        )
        yield _ade20k_row(f"MaskFormer {name}", config, side, parameters, flops)


def _eomt() -> Iterator[PaperModel]:
    """Yield the authors' models with 133 classes.

    Parameters and multiply-adds are those of inference, which uses no attention masks.
    """
    dinov2, dinov3 = "vit_{}_patch14_reg4_dinov2", "vit_{}_patch16_dinov3_qkvb"
    rows: tuple[tuple[str, str, int, int, int, float, float | None], ...] = (
        ("S 640", dinov2.format("small"), 640, 200, 3, 24.0, None),
        ("B 640", dinov2.format("base"), 640, 200, 3, 93.7, None),
        ("L 512, 100 queries", dinov2.format("large"), 512, 100, 4, 316.0, 394.05),
        ("L 640", dinov2.format("large"), 640, 200, 4, 316.7, 667.95),
        ("L 1280", dinov2.format("large"), 1280, 200, 4, 321.6, 4144.0),
        ("giant 640", dinov2.format("giant"), 640, 200, 5, 1163.6, None),
        ("S 640, DINOv3", dinov3.format("small"), 640, 200, 3, 23.4, None),
        ("B 640, DINOv3", dinov3.format("base"), 640, 200, 3, 92.4, None),
        ("L 640, DINOv3", dinov3.format("large"), 640, 200, 4, 315.0, 667.95),
    )
    for name, vit, side, queries, layers, parameters, flops in rows:
        options = {} if "dinov3" in vit else {"img_size": side}
        config = ModelConfig(
            backbone=TimmBackboneConfig(name=vit, features="tokens", options=options),
            pixel_decoder=UpscalePixelDecoderConfig(),
            transformer_decoder=EomtDecoderConfig(num_queries=queries, num_layers=layers),
            num_classes=133,
        )
        yield PaperModel(
            name=f"EoMT {name}",
            table="EoMT",
            config=config,
            size=(side, side),
            parameters=parameters,
            flops=flops,
        )


def _pmt() -> Iterator[PaperModel]:
    """Yield the authors' models with 133 classes. Parameters include those of the frozen vision transformer."""
    for name, size, side, parameters in (
        ("S 640", "small", 640, 29.3),
        ("B 640", "base", 640, 116.1),
        ("L 640", "large", 640, 357.1),
        ("L 1280", "large", 1280, 357.1),
    ):
        config = ModelConfig(
            backbone=TimmBackboneConfig(name=f"vit_{size}_patch16_dinov3_qkvb", features="tokens"),
            pixel_decoder=UpscalePixelDecoderConfig(),
            transformer_decoder=PmtDecoderConfig(),
            num_classes=133,
            freeze=("backbone",),
        )
        yield PaperModel(name=f"PMT {name}", table="PMT", config=config, size=(side, side), parameters=parameters)


def _dinov3() -> Iterator[PaperModel]:
    """Yield DINOv3's segmentation models with 150 classes.

    Parameters include those of the frozen vision transformer.
    """
    for name, vit, width, parameters in (
        ("7B 896", "vit_7b_patch16_dinov3", 2048, 7643.4),
        ("L 896, width 2048", "vit_large_patch16_dinov3_qkvb", 2048, 995.1),
        ("L 896, width 256", "vit_large_patch16_dinov3_qkvb", 256, 359.9),
    ):
        widths = {"num_heads": 16, "feedforward_dim": 4096}
        config = ModelConfig(
            backbone=ViTAdapterBackboneConfig(name=vit),
            pixel_decoder=MSDeformAttnPixelDecoderConfig(conv_dim=width, mask_dim=width, **widths),
            transformer_decoder=MaskedTransformerDecoderConfig(hidden_dim=width, **widths),
            num_classes=ADE_CLASSES,
            freeze=("backbone.vit",),
        )
        yield PaperModel(name=f"DINOv3 {name}", table="DINOv3", config=config, size=(896, 896), parameters=parameters)


def _ade20k_row(name: str, config: ModelConfig, side: int, parameters: int, flops: int | None) -> PaperModel:
    return PaperModel(
        name=f"ADE20K {name}",
        table="V",
        config=config,
        size=(side, side),
        semantic=True,
        parameters=parameters,
        flops=flops,
    )
