"""Results of the Mask2Former paper, by name of the recipe in configs/ that trains the model.

Values are in per cent, for inference at a single scale. `m2f compare` shows the row of a recipe beside its runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PANOPTIC_METRICS = ("PQ", "PQ_th", "PQ_st", "AP", "mIoU")
INSTANCE_METRICS = ("AP", "APs", "APm", "APl")


@dataclass(frozen=True)
class PaperResult:
    """One row of a table of the paper."""

    recipe: str
    table: str
    """Number of the table in the Mask2Former paper, and the data set."""
    metrics: Mapping[str, float]
    """Published metrics in per cent, under the names of results.json."""


def paper_result(recipe: str) -> PaperResult | None:
    """Return the published row for a recipe name, or None. `NAME_official` has the row of NAME."""
    return PAPER_RESULTS.get(recipe.removesuffix("_official"))


def _table(table: str, names: tuple[str, ...], rows: Mapping[str, tuple[float, ...]]) -> dict[str, PaperResult]:
    return {
        recipe: PaperResult(recipe, table, dict(zip(names, values, strict=True))) for recipe, values in rows.items()
    }


PAPER_RESULTS: dict[str, PaperResult] = {
    **_table(
        "I, COCO panoptic val2017",
        PANOPTIC_METRICS,
        {
            "coco_panoptic_r50": (51.9, 57.7, 43.0, 41.7, 61.7),
            "coco_panoptic_r101": (52.6, 58.5, 43.7, 42.6, 62.4),
            "coco_panoptic_swin_t": (53.2, 59.3, 44.0, 43.3, 63.2),
            "coco_panoptic_swin_s": (54.6, 60.6, 45.7, 44.7, 64.2),
            "coco_panoptic_swin_b": (55.1, 61.0, 46.1, 45.2, 65.1),
            "coco_panoptic_swin_b_in22k": (56.4, 62.4, 47.3, 46.3, 67.1),
            "coco_panoptic_swin_l_200q": (57.8, 64.2, 48.1, 48.6, 67.4),
        },
    ),
    **_table(
        "III, COCO val2017",
        INSTANCE_METRICS,
        {
            "coco_instance_r50": (43.7, 23.4, 47.2, 64.8),
            "coco_instance_r101": (44.2, 23.8, 47.7, 66.7),
            "coco_instance_swin_t": (45.0, 24.5, 48.3, 67.4),
            "coco_instance_swin_s": (46.3, 25.3, 50.3, 68.4),
            "coco_instance_swin_b": (46.7, 26.1, 50.5, 68.8),
            "coco_instance_swin_b_in22k": (48.1, 27.8, 52.0, 71.1),
            "coco_instance_swin_l_200q": (50.1, 29.9, 53.9, 72.1),
        },
    ),
    **_table("7, COCO panoptic val2017", ("mIoU",), {"coco_semantic_r50": (61.5,)}),
    **_table(
        "V, ADE20K val",
        ("mIoU",),
        {
            "ade20k_semantic_r50": (47.2,),
            "ade20k_semantic_r101": (47.8,),
            "ade20k_semantic_swin_t": (47.7,),
            "ade20k_semantic_swin_s": (51.3,),
            "ade20k_semantic_swin_b": (52.4,),
            "ade20k_semantic_swin_b_in22k": (53.9,),
            "ade20k_semantic_swin_l": (56.1,),
            "ade20k_semantic_swin_l_fapn": (56.4,),
        },
    ),
    **_table(
        "VIII, ADE20K val",
        ("PQ", "AP", "mIoU"),
        {
            "ade20k_panoptic_r50": (39.7, 26.5, 46.1),
            "ade20k_panoptic_swin_l_200q": (48.1, 34.2, 54.5),
            "ade20k_panoptic_swin_l_fapn_200q": (46.2, 33.2, 55.4),
        },
    ),
    **_table(
        "VIII, ADE20K val",
        INSTANCE_METRICS,
        {
            "ade20k_instance_r50": (26.4, 10.4, 28.9, 43.1),
            "ade20k_instance_swin_l_200q": (34.9, 16.3, 40.0, 54.7),
            "ade20k_instance_swin_l_fapn_200q": (33.4, 14.6, 37.6, 54.6),
        },
    ),
    **_table(
        "VII, Cityscapes val",
        ("PQ", "AP", "mIoU"),
        {
            "cityscapes_panoptic_r50": (62.1, 37.3, 77.5),
            "cityscapes_panoptic_r101": (62.4, 37.7, 78.6),
            "cityscapes_panoptic_swin_t": (63.9, 39.1, 80.5),
            "cityscapes_panoptic_swin_s": (64.8, 40.7, 81.8),
            "cityscapes_panoptic_swin_b_in22k": (66.1, 42.8, 82.7),
            "cityscapes_panoptic_swin_l_200q": (66.6, 43.6, 82.9),
        },
    ),
    **_table(
        "VII, Cityscapes val",
        ("AP", "AP50"),
        {
            "cityscapes_instance_r50": (37.4, 61.9),
            "cityscapes_instance_r101": (38.5, 63.9),
            "cityscapes_instance_swin_t": (39.7, 66.9),
            "cityscapes_instance_swin_s": (41.8, 70.4),
            "cityscapes_instance_swin_b_in22k": (42.0, 68.8),
            "cityscapes_instance_swin_l_200q": (43.7, 71.4),
        },
    ),
    **_table(
        "VII, Cityscapes val",
        ("mIoU",),
        {
            "cityscapes_semantic_r50": (79.4,),
            "cityscapes_semantic_r101": (80.1,),
            "cityscapes_semantic_swin_t": (82.1,),
            "cityscapes_semantic_swin_s": (82.6,),
            "cityscapes_semantic_swin_b_in22k": (83.3,),
            "cityscapes_semantic_swin_l": (83.3,),
        },
    ),
    **_table(
        "IX, Mapillary Vistas val",
        ("PQ", "mIoU"),
        {"mapillary_panoptic_r50": (36.3, 50.7), "mapillary_panoptic_swin_l_200q": (45.5, 60.8)},
    ),
    **_table(
        "IX, Mapillary Vistas val",
        ("mIoU",),
        {"mapillary_semantic_r50": (57.4,), "mapillary_semantic_swin_l": (63.2,)},
    ),
}
