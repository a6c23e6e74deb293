from pathlib import Path

import pytest

from m2f.cluster.analyze.class_counts import with_class_count
from m2f.cluster.recipe.load import load_recipe, parse_recipe
from m2f.model.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(autouse=True)
def empty_working_directory(monkeypatch, tmp_path):
    """Run in a folder that has neither shards nor raw data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("M2F_DATA", raising=False)


@pytest.mark.parametrize(
    ("recipe", "classes", "name"),
    [
        ("coco/coco_panoptic_r50", 133, "COCO"),
        ("coco/coco_semantic_r50", 133, "COCO"),
        ("coco/coco_instance_r50", 80, "COCO"),
        ("ade20k/ade20k_semantic_r50", 150, "ADE20K"),
        ("ade20k/ade20k_instance_r50", 100, "ADE20K"),
        ("cityscapes/cityscapes_panoptic_r50", 19, "Cityscapes"),
        ("cityscapes/cityscapes_instance_r50", 8, "Cityscapes"),
        ("mapillary/mapillary_panoptic_r50", 65, "Mapillary Vistas 1.2"),
        ("mapillary/mapillary_semantic_r50", 65, "Mapillary Vistas 1.2"),
    ],
)
def test_class_counts_of_published_data_sets_need_no_files(recipe, classes, name):
    found = with_class_count(load_recipe(CONFIGS / f"{recipe}.yaml"))
    assert found.model.num_classes == classes
    assert f"assuming the {classes} classes of {name}; neither shards nor source found" in str(found.assumption)


def own_recipe(source, more=""):
    return parse_recipe(
        f"name: own\ndatasets: {{train: {{shards: none, source: {source}{more}}}}}\n"
        "data: {task: semantic, train: [{dataset: train}]}\ntraining: {max_steps: 1}\n"
    )


def test_classes_of_an_existing_source_are_counted():
    found = with_class_count(own_recipe("{kind: synthetic, num_images: 2}"))
    assert (found.model.num_classes, found.assumption) == (10, None)


def test_missing_own_data_is_rejected_with_a_remedy():
    for source in (
        "{kind: coco_panoptic, images: i, panoptic_json: mine.json, panoptic_masks: m}",
        "{kind: label_maps, images: i, labels: l, categories: c.json}",
    ):
        with pytest.raises(ConfigError, match="write its shards with m2f shard, or set the number of classes"):
            with_class_count(own_recipe(source))
