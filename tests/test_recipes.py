"""Tests that every recipe loads, matches the paper and the official configuration, and trains a step."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from m2f.cluster.recipe.ablations import TABLE, ablations
from m2f.cluster.recipe.load import dump_recipe, flatten, load_recipe, parse_recipe
from m2f.cluster.recipe.same_model import model_changes
from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.config import LargeScaleJitter, ScaleJitter, ShortestEdgeCrop
from m2f.data_pipeline.readers.ade20k_classes import CATEGORIES_150
from m2f.data_pipeline.readers.cityscapes import CATEGORIES as CATEGORIES_19
from m2f.data_pipeline.sample import Annotation, DecodedSample, Segment
from m2f.data_pipeline.transforms.collate import collate
from m2f.data_pipeline.transforms.example import TrainTransform, make_example
from m2f.model.config import (
    FaPNPixelDecoderConfig,
    MSDeformAttnPixelDecoderConfig,
    PostprocessConfig,
    SwinBackboneConfig,
    TimmBackboneConfig,
    TransformerFPNPixelDecoderConfig,
)
from m2f.model.errors import ConfigError
from m2f.model.loss.criterion import count_normalizers
from m2f.model.mask2former import build_model
from m2f.trainer.config import MultiStepSchedule, OptimizerConfig, PolySchedule
from m2f.trainer.engine.module import TrainingModule
from m2f.trainer.engine.schedule import lr_factor
from m2f.trainer.memory.plan import plan_memory

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs"
RECIPES = {path.stem: path for path in sorted(CONFIGS.rglob("*.yaml")) if path.name != TABLE.name}
ABLATIONS = {
    f"{base}_{ablation.name}": (base, ablation) for ablation in ablations().values() for base in ablation.published
}
"""Base recipe and ablation, by the name of the run."""
_NOT_IN_PAPER = (CONFIGS, *(CONFIGS / folder for folder in ("eomt", "finetune", "pmt", "vit_adapter")))
PAPER_RECIPES = [*(n for n, path in RECIPES.items() if path.parent not in _NOT_IN_PAPER), *ABLATIONS]
"""Names of the recipes of the paper's tables."""
HEAD_RECIPES = [n for n, path in RECIPES.items() if path.parent.name in ("eomt", "pmt", "vit_adapter")]


@cache
def load_config(name):
    base, ablation = ABLATIONS.get(name, (name, None))
    return load_recipe(base if ablation is None else f"{base}+{ablation.name}")


def is_in_folder(name, *folders):
    return (RECIPES[name].relative_to(CONFIGS).parts[0] if name in RECIPES else "ablations") in folders


# Files


def test_recipe_names_are_unique():
    assert len(RECIPES) == len(list(CONFIGS.rglob("*.yaml"))) - 1
    assert not RECIPES.keys() & ABLATIONS.keys()


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_changes_its_base_recipe_and_states_the_published_result(name):
    base, ablation = ABLATIONS[name]
    changed, before = load_config(name), load_config(base)
    assert changed.name == name
    assert changed != replace(before, name=name)
    assert re.match(r"(PQ|AP|mIoU) ([\d.]+ .*|of Figure IV, .*)\(paper", ablation.published[base])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("coco_panoptic_r5", "did you mean coco_panoptic_r50"),
        ("coco_panoptic_r50+cross_atention", "did you mean cross_attention"),
        ("ade20k_semantic_r50+12ep", "applies to coco_instance_r50, coco_panoptic_r50, not to ade20k_semantic_r50"),
        ("configs/none.yaml", "cannot read the recipe"),
    ],
)
def test_unknown_recipe_name_suggests_the_closest(recipe, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe(recipe)


def test_ablations_that_contradict_each_other_are_rejected():
    with pytest.raises(ConfigError, match=r"'smca' sets model\.transformer_decoder\.attention to .* choose one"):
        load_recipe("coco_panoptic_r50+cross_attention+smca")


def test_recipe_name_accepts_overrides_and_several_ablations():
    config = load_recipe("coco_panoptic_r50+cross_attention+200q", ["training.max_steps=7", "name=mine"])
    assert config.model.transformer_decoder.attention == "cross"
    assert config.model.transformer_decoder.num_queries == 200
    assert (config.name, config.training.max_steps) == ("mine", 7)
    assert load_recipe("coco_panoptic_r50+cross_attention+200q").name == "coco_panoptic_r50_cross_attention_200q"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load_and_start_with_command_and_expected_result(name):
    path = RECIPES[name]
    lines = path.read_text().splitlines()
    command = "m2f demo" if name == "demo" else f"m2f train {path.relative_to(REPOSITORY).as_posix()}"
    assert lines[0].startswith("# ")
    assert lines[0].endswith(command)
    assert re.match(r"# .*(PQ|AP|mIoU)", lines[1]), "line 2 must state the expected result"
    config = parse_recipe(path.read_text(), source=path.name)
    assert config.name == name
    assert "GPU" in lines[1] or config.cluster.num_gpus_per_worker in ("auto", 0), "line 2 must state the GPUs"


def test_recipes_document_lists_every_recipe_with_its_results():
    document = (REPOSITORY / "docs" / "recipes.md").read_text()
    listed = {name for pattern in re.findall(r"`([\w*+]+)`", document) for name in expand_pattern(pattern)}
    assert listed == {*PAPER_RECIPES, *HEAD_RECIPES}
    columns: list[str] = []
    for line in document.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        columns = cells if "mIoU" in cells else columns
        for name in (name for pattern in re.findall(r"`([\w*+]+)`", cells[0]) for name in expand_pattern(pattern)):
            if line.startswith("|"):
                assert stated_results(name).items() <= dict(zip(columns, cells, strict=True)).items(), name


def expand_pattern(pattern):
    """Return the recipes that a name in the document means: `*_r50+smca` means an ablation on three tasks."""
    name = pattern.replace("+", "_").replace("*", r"(coco_panoptic|coco_instance|ade20k_semantic)")
    return [recipe for recipe in (*PAPER_RECIPES, *HEAD_RECIPES) if re.fullmatch(name, recipe)]


def stated_results(name):
    """Return PQ, AP and mIoU from the second line of a recipe."""
    base, ablation = ABLATIONS.get(name, (name, None))
    expected = RECIPES[name].read_text().splitlines()[1] if ablation is None else ablation.published[base]
    return dict(re.findall(r"(?<!boundary )\b(PQ|AP|mIoU) ([\d.]+)", expected))


@pytest.mark.parametrize(
    ("tuned", "published"),
    [("r50", "r50"), ("swin_t", "swin_t"), ("swin_s", "swin_s"), ("swin_b", "swin_b"), ("swin_l", "swin_l_200q")],
)
def test_finetune_recipes_match_the_model_of_the_published_weights(tuned, published):
    recipe, base = load_config(f"finetune_{tuned}"), load_config(f"coco_instance_{published}")
    assert model_changes(dump_recipe(base), dump_recipe(recipe)) == ()
    assert recipe.model.weights is not None
    size = {"swin_t": "tiny", "swin_s": "small", "swin_b": "base", "swin_l": "large"}.get(tuned, "model_final_3c8ec9")
    assert size in recipe.model.weights


def test_the_ade20k_panoptic_recipe_of_eomt_starts_from_coco_weights_of_the_same_model():
    recipe, coco = load_config("eomt_ade20k_panoptic_l_640"), load_config("eomt_coco_panoptic_l_640")
    assert recipe.model.weights == "hub:tue-mps/coco_panoptic_eomt_large_640"
    assert model_changes(dump_recipe(coco), dump_recipe(recipe)) == ()


@pytest.mark.parametrize("name", [name for name in HEAD_RECIPES if re.match("(eomt|pmt)_(?!shapes)", name)])
def test_eomt_and_pmt_recipes_augment_images_as_their_authors(name):
    config = load_config(name)
    augment, is_semantic = config.data.augment, config.data.task == "semantic"
    assert isinstance(augment, LargeScaleJitter)
    assert augment.color == ("_coco_" not in name)
    assert (augment.min_scale, augment.max_scale) == (0.5 if is_semantic else 0.1, 2.0)
    assert str(augment.size) in name.split("_")
    assert config.model.transformer_decoder.num_queries == (100 if is_semantic else 200)
    assert config.training.optimizer.clip_norm == 0.01


@pytest.mark.parametrize("name", [name for name, path in RECIPES.items() if re.search(r"of \d+ GB", path.read_text())])
def test_recipes_fit_into_the_gpus_that_they_name(name):
    config, gigabytes = load_config(name), re.search(r"GPUs of (\d+) GB", RECIPES[name].read_text())
    model = replace(config.model, num_classes=150)
    plan = plan_memory(model, config.data, config.training, config.cluster.num_workers, targets=100)
    assert plan.micro_batch == config.training.micro_batch <= plan.largest_micro_batch(float(gigabytes[1]) * 1e9)


# Facts of the official configurations


COCO_EPOCH = 7375
"""Number of steps with 16 images that the official code counts as an epoch of COCO."""


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_schedules_match_the_official_code(name):
    training = load_config(name).training
    assert training.global_batch == 16
    is_maskformer = re.search(r"maskformer_r50$", name)  # MaskFormer has its own training settings
    assert training.optimizer == OptimizerConfig(weight_decay=1e-4 if is_maskformer else 0.05)
    if not name.startswith("coco"):
        steps = {"ade20k": 160_000, "cityscapes": 90_000, "mapillary": 300_000}[name.split("_")[0]]
        assert (training.max_steps, training.schedule) == (steps, PolySchedule(power=0.9))
    elif is_maskformer:
        assert (training.max_steps, training.schedule) == (554_400, MultiStepSchedule(milestones=(369_600,)))
    else:
        match = re.search(r"_(\d+)ep", name)
        epochs = int(match[1]) if match else 100 if "swin_l" in name else 50
        milestones = tuple(round(step * epochs / 50) for step in (327_778, 355_092))
        assert training.max_steps == epochs * COCO_EPOCH
        assert training.schedule == MultiStepSchedule(milestones=milestones)


@pytest.mark.parametrize(
    ("golden", "name"),
    [
        ("coco_50ep", "coco_panoptic_r50"),
        ("coco_100ep", "coco_instance_swin_l_200q"),
        ("ade20k_160k", "ade20k_semantic_swin_t"),
        ("cityscapes_90k", "cityscapes_panoptic_r50"),
        ("mapillary_300k", "mapillary_semantic_r50"),
    ],
)
def test_learning_rates_match_the_official_code(goldens, golden, name):
    expected = json.loads((goldens / "g_lr_schedule.json").read_text())[golden]
    training = load_config(name).training
    assert training.max_steps == expected["max_iter"]
    for step, lr in expected["lr_at_iter"]:
        ours = training.optimizer.lr * lr_factor(training.schedule, step, training.max_steps)
        assert ours == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_image_sizes_match_the_official_code(name):
    config = load_config(name)
    augment, data_set = config.data.augment, name.split("_")[0]
    if data_set == "coco":
        assert (config.evaluation.shortest_edge, config.evaluation.max_size) == (800, 1333)
        if isinstance(augment, LargeScaleJitter):
            assert (augment.size, augment.min_scale, augment.max_scale) == (1024, 0.1, 2.0)
        return
    assert isinstance(augment, ShortestEdgeCrop)
    large = re.search("panoptic|instance|swin_[bl]", name)
    base = {"ade20k": 640 if large else 512, "cityscapes": 1024, "mapillary": 2048}[data_set]
    crops = {"ade20k": (base, base), "cityscapes": (512, 1024), "mapillary": (1024, 1024)}
    assert augment.shortest_edges == tuple(int(x * 0.1 * base) for x in range(5, 21))
    assert (augment.max_size, augment.crop, augment.color) == (4 * base, crops[data_set], True)
    longest = {"ade20k": 4 * base, "cityscapes": 2048, "mapillary": 2048}[data_set]
    assert (config.evaluation.shortest_edge, config.evaluation.max_size) == (base, longest)


def test_only_convergence_and_maskformer_recipes_augment_coco_differently():
    others = {n: load_config(n).data.augment for n in PAPER_RECIPES if n.startswith("coco")}
    others = {n: augment for n, augment in others.items() if isinstance(augment, ScaleJitter)}
    pattern = r".*_standard|coco.*_maskformer_r50"
    assert set(others) == {name for name in PAPER_RECIPES if re.fullmatch(pattern, name)}
    for name, augment in others.items():
        cropped = not name.endswith("_standard")
        assert augment == ScaleJitter(
            shortest_edges=tuple(range(480 if cropped else 640, 801, 32)), crop_first=(384, 600) if cropped else None
        )


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_queries_thresholds_and_norms_match_the_official_code(name):
    config = load_config(name)
    match = re.search(r"_(\d+)q$", name)
    assert config.model.transformer_decoder.num_queries == (int(match[1]) if match else 100)
    assert ("swin_l" in name and "semantic" not in name) <= name.endswith("200q")
    postprocess = config.model.postprocess
    assert postprocess.object_threshold == (0.0 if name.startswith("mapillary_panoptic") else 0.8)
    assert postprocess.overlap_threshold == 0.8
    assert postprocess.semantic_resize == ("class_scores" if config.data.task == "semantic" else "masks")
    backbone = config.model.backbone
    assert isinstance(backbone, SwinBackboneConfig) == ("swin" in name)
    if isinstance(backbone, TimmBackboneConfig):
        assert backbone.name == f"resnet{101 if 'r101' in name else 50}.tv_in1k"
        assert backbone.pretrained
        trained = name.startswith("cityscapes") or name == "ade20k_semantic_r101"
        assert backbone.norm == ("sync_batch" if trained else "frozen_batch")


@pytest.mark.parametrize("name", [name for name in PAPER_RECIPES if "swin" in name])
def test_swin_recipes_use_pretrained_weights_of_matching_shape(name):
    backbone = load_config(name).model.backbone
    size, window, width = {
        (96, 6): ("tiny", 7, 224),
        (96, 18): ("small", 7, 224),
        (128, 18): ("base", 12, 384),
        (192, 18): ("large", 12, 384),
    }[backbone.embed_dim, backbone.depths[2]]
    data = "in22k" if "in22k" in name or size == "large" else "in1k"
    assert f"swin_{size[0]}" in name
    assert backbone.pretrained == f"swin_{size}_patch4_window{window}_{width}.ms_{data}"
    assert (backbone.window_size, backbone.drop_path) == (window, 0.3)


OFFICIAL_SETTINGS = {
    "model.loss.class_norm": "per_rank",
    "data.augment.shrink": "bilinear",
    "data.crop_padding": "grey",
    "evaluation.shrink": "bilinear",
    "training.precision": "fp16_autocast",
}


@pytest.mark.parametrize("name", [name for name in PAPER_RECIPES if name.endswith("_official")])
def test_official_recipes_change_only_the_documented_settings(name):
    changed = OFFICIAL_SETTINGS | ({"data.drop_empty_targets": "False"} if "panoptic" in name else {})
    changed |= {"data.rasterise": "crop"} if "instance" in name else {}
    assert differences(name.removesuffix("_official"), name) == changed


# Ablations


ALLOWED_SETTINGS = {
    "attention": r"model\.transformer_decoder\.attention",
    "features": r"model\.transformer_decoder\.features",
    "decoder": r"model\.transformer_decoder\.(queries|cross_attention_first|dropout)",
    "queries": r"model\.transformer_decoder\.num_queries",
    "pixel_decoder": r"model\.pixel_decoder\..*",
    "loss": r"model\.loss\.(matching|supervision)|training\.micro_batch",
    "epochs": r"training\.(max_steps|schedule\.milestones\.\d)|data\.augment\..*",
}
"""Settings that an ablation may change, by subject."""


def differences(base, name):
    """Return the settings of `name` that differ from those of `base`, except for the name."""
    changed, original = (flatten(load_config(n)) for n in (name, base))
    keys = (changed.keys() | original.keys()) - {"name"}
    return {key: changed.get(key, "") for key in keys if changed.get(key) != original.get(key)}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_changes_settings_of_one_group_only(name):
    changed = differences(ABLATIONS[name][0], name)
    assert changed
    assert any(all(re.fullmatch(pattern, key) for key in changed) for pattern in ALLOWED_SETTINGS.values()), changed


@pytest.mark.parametrize(
    "name", [n for n in PAPER_RECIPES if not is_in_folder(n, "ablations", "maskformer") and not n.endswith("_official")]
)
def test_backbone_recipes_differ_only_in_allowed_settings(name):
    """Compared with R50 on the same data and task: backbone, queries, micro-batch, FaPN, the schedule of Swin-L on
    COCO, and the larger crops on ADE20K."""
    allowed = r"model\.backbone\..*|model\.transformer_decoder\.num_queries|training\.micro_batch"
    if "fapn" in name:
        allowed += r"|model\.pixel_decoder\..*"
    if name.startswith("coco") and "swin_l" in name:
        allowed += r"|training\.(max_steps|schedule\.milestones\.\d)"
    if re.match("ade20k_semantic_swin_[bl]", name):
        allowed += r"|data\.augment\..*|evaluation\.(shortest_edge|max_size)"
    if name.endswith("trainval"):
        allowed += r"|data\.train\..*|evaluation\..*"
    base = re.match(r"\w+?_(panoptic|instance|semantic)", name)[0] + "_r50"
    assert [key for key in differences(base, name) if not re.fullmatch(allowed, key)] == []


# One step


def category_table(num_things, num_stuff):
    kinds = [True] * num_things + [False] * num_stuff
    return CategoryTable(tuple(Category(i, f"class {i}", thing, (i, 0, 0)) for i, thing in enumerate(kinds, start=1)))


TABLES = {
    "coco": category_table(80, 53),
    "ade20k": CATEGORIES_150,
    "cityscapes": CATEGORIES_19,
    "mapillary": category_table(37, 28),
}
CLASSES = {
    "coco": (133, 80, 133),
    "ade20k": (150, 100, 150),
    "cityscapes": (19, 8, 19),
    "mapillary": (65, 37, 65),
}
"""Number of classes of panoptic, instance and semantic models (paper section 4)."""


def test_category_tables_have_the_class_counts_of_the_paper():
    for data_set, counts in CLASSES.items():
        tasks = ("panoptic", "instance", "semantic")
        assert tuple(len(TABLES[data_set].for_task(task)) for task in tasks) == counts


def shrink_model(model):
    """Return a model of the same structure with few channels and layers."""
    if isinstance(model.backbone, SwinBackboneConfig):
        backbone = replace(model.backbone, embed_dim=8, depths=(2, 1, 1, 1), num_heads=(1, 1, 2, 2), pretrained=None)
    else:
        options = {"channels": [16, 16, 32, 32]}
        backbone = replace(model.backbone, name="resnet10t", pretrained=False, options=options)
    pixel_decoder = replace(model.pixel_decoder, conv_dim=32, mask_dim=32)
    match pixel_decoder:
        case MSDeformAttnPixelDecoderConfig() | TransformerFPNPixelDecoderConfig():
            pixel_decoder = replace(pixel_decoder, num_layers=1, num_heads=2, feedforward_dim=32)
        case FaPNPixelDecoderConfig():
            pixel_decoder = replace(pixel_decoder, offset_groups=2)
    decoder = replace(model.transformer_decoder, num_layers=3, hidden_dim=32, num_heads=2, feedforward_dim=32)
    loss = replace(model.loss, num_points=64)
    return replace(model, backbone=backbone, pixel_decoder=pixel_decoder, transformer_decoder=decoder, loss=loss)


def shrink_augmentation(augment):
    match augment:
        case LargeScaleJitter():
            return replace(augment, size=64)
        case ShortestEdgeCrop(crop=(height, width)):
            edges = tuple(edge * 64 // width for edge in augment.shortest_edges)
            return replace(augment, shortest_edges=edges, max_size=256, crop=(64 * height // width, 64))
        case ScaleJitter():
            return replace(augment, shortest_edges=(48, 64), max_size=96)


def reduce_recipe(name):
    """Return the recipe with a model and an augmentation that are small enough for a step in a test."""
    config = load_config(name)
    data = replace(config.data, augment=shrink_augmentation(config.data.augment))
    return replace(config, model=shrink_model(config.model), data=data)


def representative_recipes():
    """Yield recipes with a model structure or a kind of data that no earlier recipe has."""
    covered: set[str] = set()
    for name in PAPER_RECIPES:
        config = reduce_recipe(name)
        structure = replace(config.model, postprocess=PostprocessConfig())
        traits = {repr(structure), f"{name.split('_')[0]} {config.data.task} {type(config.data.augment)}"}
        if traits - covered:
            yield name
        covered |= traits


def checkered_sample(table, position):
    """Return an image of 48 x 64 pixels with a grid of twelve segments, alternating between things and stuff."""
    things, stuff = ([c for c in table.categories if c.is_thing == is_thing] for is_thing in (True, False))
    columns, rows = np.meshgrid(np.arange(64) // 16, np.arange(48) // 16)
    seg = (1 + 4 * rows + columns).astype(np.uint8)
    segments = []
    for number in range(1, 13):
        group = (things, stuff)[number % 2]
        category = group[(7 * number + position) % len(group)]
        segments.append(
            Segment(
                id=number,
                category_id=category.id,
                is_thing=category.is_thing,
                is_crowd=False,
                area=256.0,
                bbox=(0.0, 0.0, 16.0, 16.0),
                source_id=number,
                map="seg",
            )
        )
    image = np.random.default_rng(position).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    annotation = Annotation(seg=seg, inst=None, segments=tuple(segments))
    return DecodedSample(key=f"s{position}", image_id=position, source="memory", image=image, annotation=annotation)


def make_batch(config, table):
    recipe = TrainTransform(
        task=config.data.task,
        labels=table.labels(config.data.task),
        augment=config.data.augment,
        drop_empty_targets=config.data.drop_empty_targets,
        seed=0,
    )
    return collate([make_example(checkered_sample(table, p), 0, p, recipe) for p in range(2)], recipe.canvas)


@pytest.mark.parametrize("name", representative_recipes())
def test_reduced_recipe_trains_one_step(name):
    config, table = reduce_recipe(name), TABLES[name.split("_")[0]]
    model_config = replace(config.model, num_classes=len(table.for_task(config.data.task)))
    torch.manual_seed(0)
    module = TrainingModule(build_model(model_config), model_config, seed=0, precision="fp32")
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    batch = make_batch(config, table)
    assert batch.targets.valid.any()
    queries = model_config.transformer_decoder.num_queries
    losses = module(batch, count_normalizers(batch.targets, queries, model_config.loss))
    losses.total.backward()
    assert torch.isfinite(losses.total)
    without_gradient = [key for key, parameter in module.named_parameters() if parameter.grad is None]
    assert without_gradient == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
