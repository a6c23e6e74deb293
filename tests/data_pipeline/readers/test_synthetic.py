from __future__ import annotations

import hashlib
import json
import pickle

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from m2f.data_pipeline.image_file import decode_rgb
from m2f.data_pipeline.readers import open_reader, source_fingerprint
from m2f.data_pipeline.readers.shapes import SHAPES, TEXTURES
from m2f.data_pipeline.readers.synthetic import CATEGORIES, write_synthetic_coco
from m2f.data_pipeline.readers.synthetic_image import draw_image
from m2f.data_pipeline.sources import CocoInstancesSource, SyntheticSource
from m2f.model.errors import ConfigError


@pytest.fixture(scope="module")
def images():
    return [draw_image(0, index) for index in range(120)]


def test_image_depends_only_on_seed_and_index(images):
    again = draw_image(0, 5)
    assert np.array_equal(again.image, images[5].image)
    assert np.array_equal(again.seg, images[5].seg)
    others = [draw_image(1, 5), draw_image(5, 0), images[6]]
    assert not any(other.image.shape == again.image.shape and (other.image == again.image).all() for other in others)


def test_images_are_as_hard_as_documented(images):
    objects = [
        (hidden, diameter)
        for drawn in images
        for name, hidden, diameter in zip(drawn.names, drawn.hidden, drawn.diameters, strict=True)
        if name in SHAPES
    ]
    counts = [sum(name in SHAPES for name in drawn.names) for drawn in images]
    assert min(counts) >= 3  # an object without enough room is left out
    assert max(counts) == 12
    assert np.mean([hidden > 0.1 for hidden, _ in objects]) > 0.3
    assert 0.2 < np.mean([diameter < 12 for _, diameter in objects]) < 0.3
    assert {name for drawn in images for name in drawn.names} == {*SHAPES, *TEXTURES}
    for drawn in images:
        assert all(128 <= side <= 192 for side in drawn.seg.shape)
        assert np.array_equal(np.unique(drawn.seg), np.arange(1, len(drawn.names) + 1))


def test_share_and_diameters_of_small_objects_can_be_set():
    source = SyntheticSource(num_images=40, seed=3, small_share=0.6, small_diameters=(4.0, 12.0))
    reader = open_reader(source)
    small = [
        segment.area
        for index in range(40)
        for segment in reader.read(index).annotation.segments
        if segment.is_thing and segment.map == "seg" and segment.area < 12**2
    ]
    drawn = [draw_image(3, index, 0.6, (4.0, 12.0)) for index in range(40)]
    diameters = [d for image in drawn for d in image.diameters if 0 < d < 30]
    objects = sum(d > 0 for image in drawn for d in image.diameters)
    assert min(diameters) < 4.5
    assert 11.5 < max(diameters) < 12
    assert 0.5 < len(diameters) / objects < 0.7
    assert min(small) < 12
    assert all(
        hidden == 0 for image in drawn for hidden, d in zip(image.hidden, image.diameters, strict=True) if 0 < d < 30
    )


def test_object_sizes_change_the_fingerprint_unless_they_are_the_defaults():
    """Existing shards have the digest of a source without these settings, so defaults must not change it."""
    digest = hashlib.sha256(b"synthetic")
    digest.update(b'{"image_id_start": 1, "kind": "synthetic", "num_images": 5, "seed": 2}')
    assert source_fingerprint(SyntheticSource(num_images=5, seed=2)) == digest.hexdigest()
    others = [{"small_share": 0.5}, {"small_diameters": (4.0, 12.0)}]
    assert len({source_fingerprint(SyntheticSource(num_images=5, seed=2, **other)) for other in [{}, *others]}) == 3


@pytest.mark.parametrize("names", [SHAPES, TEXTURES], ids=["shapes", "textures"])
def test_colours_do_not_reveal_the_class(images, names):
    """All shapes have the same mean colour up to chance, and so do all textures."""
    centers = []
    for name in names:
        pixels = [drawn.image[drawn.seg == i].mean(axis=0) for drawn in images for i in ids_with_name(drawn, name)]
        centers.append(np.mean(pixels, axis=0))
    assert np.abs(np.array(centers) - np.mean(centers, axis=0)).max() < 20


def ids_with_name(drawn, name):
    return [local_id for local_id, other in enumerate(drawn.names, start=1) if other == name]


CATEGORIES_BY_NAME = {category.name: category.id for category in CATEGORIES.categories}


def _mean_colours(train):
    """Return the mean colour [classes, 3] over all pixels of each class."""
    pixels = {name: [] for name in CATEGORIES_BY_NAME}
    for drawn in train:
        for local_id, name in enumerate(drawn.names, start=1):
            pixels[name].append(drawn.image[drawn.seg == local_id])
    return np.array([np.concatenate(values).mean(axis=0) for values in pixels.values()])


def _colour_baseline(centers, drawn):
    """Return (class, mask) pairs of a nearest-mean-colour classifier; connected components of shapes are objects."""
    nearest = np.linalg.norm(drawn.image[:, :, None].astype(float) - centers, axis=-1).argmin(axis=-1)
    predictions = []
    for label, name in enumerate(CATEGORIES_BY_NAME):
        mask = (nearest == label).astype(np.uint8)
        if name in TEXTURES:
            predictions += [(name, mask > 0)] if mask.any() else []
        else:
            count, components = cv2.connectedComponents(mask, connectivity=8)
            sizes = np.bincount(components.ravel())
            predictions += [(name, components == c) for c in range(1, count) if sizes[c] >= 25]
    return predictions


def _panoptic_quality(pairs):
    """Return PQ averaged over classes: sum of matched IoUs / (TP + FP / 2 + FN / 2)."""
    tally = {name: [0.0, 0, 0, 0] for name in CATEGORIES_BY_NAME}
    for drawn, predictions in pairs:
        matched = set()
        for name, mask in predictions:
            best = None
            for local_id in np.unique(drawn.seg[mask]):
                truth = drawn.seg == local_id
                iou = (truth & mask).sum() / (truth | mask).sum()
                if iou > 0.5 and drawn.names[local_id - 1] == name:
                    best = (local_id, iou)
            if best:
                matched.add(best[0])
                tally[name][0] += best[1]
                tally[name][1] += 1
            else:
                tally[name][2] += 1
        for local_id, name in enumerate(drawn.names, start=1):
            tally[name][3] += local_id not in matched
    return np.mean([iou / max(tp + 0.5 * fp + 0.5 * fn, 1) for iou, tp, fp, fn in tally.values()])


def test_a_colour_baseline_fails(images):
    train, held_out = images[:80], images[80:92]
    centers = _mean_colours(train)
    quality = _panoptic_quality([(drawn, _colour_baseline(centers, drawn)) for drawn in held_out])
    perfect = _panoptic_quality(
        [(s, [(name, s.seg == i) for i, name in enumerate(s.names, start=1)]) for s in held_out]
    )
    assert perfect == 1.0
    assert quality < 0.25


def test_coco_files_hold_the_same_samples(tmp_path):
    config = SyntheticSource(num_images=6, seed=3, image_id_start=100)
    source = write_synthetic_coco(tmp_path, config)
    in_memory, from_files = open_reader(config), open_reader(source)
    assert tuple(from_files.keys) == tuple(in_memory.keys)
    assert from_files.categories == in_memory.categories
    for index in range(6):
        expected, actual = in_memory.read(index), from_files.read(index)
        assert np.array_equal(expected.annotation.seg, actual.annotation.seg)
        assert np.array_equal(expected.annotation.inst, actual.annotation.inst)
        assert expected.annotation.segments == actual.annotation.segments
        fields = ("key", "image_id", "source", "image", "image_ext", "height", "width")
        assert all(getattr(expected, name) == getattr(actual, name) for name in fields)
    instances = open_reader(CocoInstancesSource(images=source.images, instances_json=source.instances_json))
    assert instances.read(2).annotation.inst is not None


def test_coco_files_are_read_by_pycocotools(tmp_path):
    source = write_synthetic_coco(tmp_path, SyntheticSource(num_images=3))
    official = COCO(source.instances_json)
    assert len(official.getImgIds()) == 3
    for annotation in official.anns.values():
        mask = official.annToMask(annotation)
        assert mask.sum() == annotation["area"]
        ys, xs = np.nonzero(mask)
        assert annotation["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
    panoptic = json.loads((tmp_path / "panoptic.json").read_text())
    assert all(len({s["id"] for s in a["segments_info"]}) == len(a["segments_info"]) for a in panoptic["annotations"])
    assert max(s["id"] for a in panoptic["annotations"] for s in a["segments_info"]) > 255


def test_reader_is_picklable_and_subsets_keep_their_images():
    reader = open_reader(SyntheticSource(num_images=1000, seed=4))
    part = pickle.loads(pickle.dumps(reader.subset([7, 900])))
    sample = part.read(1)
    assert part.keys == ("synthetic-4-000007", "synthetic-4-000900")
    assert sample.image == reader.read(900).image
    assert sample.image_id == 901
    decoded = decode_rgb(sample.image)
    assert np.abs(decoded.astype(int) - draw_image(4, 900).image).mean() < 6
    assert reader.size_hint(0) == pytest.approx(np.mean([len(reader.read(i).image) for i in range(5)]), rel=0.5)


def test_invalid_settings_are_refused():
    with pytest.raises(ConfigError, match="num_images is 0"):
        SyntheticSource(num_images=0)
    with pytest.raises(ConfigError, match="seed is -1"):
        SyntheticSource(seed=-1)
    with pytest.raises(ConfigError, match="at least 4 and below 30"):
        SyntheticSource(small_diameters=(3.0, 8.0))
    with pytest.raises(ConfigError, match="put the smaller diameter first"):
        SyntheticSource(small_diameters=(12.0, 8.0))
