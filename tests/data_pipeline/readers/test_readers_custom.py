from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import m2f
from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.readers import open_reader, source_fingerprint
from m2f.data_pipeline.readers.custom import CustomReader
from m2f.data_pipeline.sample import Annotation, Segment
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.verify import verify
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import CustomSource
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.targets import image_targets
from m2f.eval.metrics.truth import instance_truth

DOCUMENT = Path(m2f.__file__).parents[1] / "docs" / "datasets.md"
H, W = 6, 8
TABLE = CategoryTable((Category(1, "cell", True, (1, 2, 3)),))
INST = np.zeros((1, H, W), np.uint8)
IMAGE = encode_png(np.full((H, W, 3), 90, np.uint8))


def _segment(id_, map_="seg", category_id=1):
    return Segment(
        id=id_,
        category_id=category_id,
        is_thing=True,
        is_crowd=False,
        area=4.0,
        bbox=(0, 0, 2, 2),
        source_id=id_,
        map=map_,
    )


def _annotation(**changes):
    seg = np.zeros((H, W), np.uint8)
    seg[:2, :2] = 1
    return replace(Annotation(seg=seg, inst=None, segments=(_segment(1),)), **changes)


def _read(annotation, image=IMAGE):
    return CustomReader.of(TABLE, ("scans/a.png",), lambda _: (image, annotation), 10_000).read(0)


def test_the_documented_example_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "slides").mkdir()
    for name in ("one", "two"):
        values = np.ones((H, W), np.int64)
        values[0] = 0
        values[1:3, :2], values[3:5, 4:] = 2, 3
        np.save(tmp_path / "slides" / f"{name}.npy", values)
        (tmp_path / "slides" / f"{name}.jpg").write_bytes(IMAGE)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    exec(compile(code, "docs/datasets.md", "exec"), {})
    assert "2 samples" in capsys.readouterr().out
    manifest = Manifest.load("shards/slides", Storage())
    sample = manifest.read_sample(0, Storage())
    assert [(s.category_id, s.area) for s in sample.annotation.segments] == [(1, 28), (2, 4), (2, 8)]
    assert sample.source in ("slides/one.jpg", "slides/two.jpg")


def test_custom_source_is_not_opened_but_its_version_changes_the_fingerprint():
    function = re.escape(f"{write_dataset.__module__}.{write_dataset.__name__}")
    with pytest.raises(DataError, match=rf"source.kind is custom.* calls {function} \(docs/datasets.md"):
        open_reader(CustomSource())
    assert source_fingerprint(CustomSource()) == source_fingerprint(CustomSource(version=1))
    assert source_fingerprint(CustomSource()) != source_fingerprint(CustomSource(version=2))


def test_custom_samples_and_subsets():
    names = ("scans/a.png", "scans/b.png")
    reader = CustomReader.of(TABLE, names, lambda _: (IMAGE, _annotation()), DatasetConfig.max_pixels)
    part = reader.subset([1])
    sample = part.read(0)
    assert (sample.key, sample.image_id, sample.source, part.source(0)) == (reader.keys[1], 1, names[1], names[1])
    assert (sample.height, sample.width, sample.image) == (H, W, IMAGE)
    assert reader.size_hint(1) > len(IMAGE)
    with pytest.raises(DataError, match="would have the same key 'a'"):
        CustomReader.of(TABLE, ("a.png", "a.jpg"), lambda _: (IMAGE, _annotation()), 10)
    with pytest.raises(DataError, match=r"scans/a\.png and scans/a\.png would have the same key"):
        CustomReader.of(TABLE, (names[0], names[0], names[1]), lambda _: (IMAGE, _annotation()), 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seg": None}, "has neither `seg` nor `inst`"),
        ({"inst": np.zeros((1, H, W + 1), np.uint8)}, "`seg` and `inst` differ in size"),
        ({"segments": (_segment(1, category_id=5),)}, "categories that the table does not define: 5"),
        ({"segments": ()}, "`seg` has ids without a segment: 1"),
        ({"segments": (_segment(1), _segment(2))}, "segments have no pixel in `seg`: 2"),
        ({"segments": (_segment(1), _segment(1))}, "segment ids of `seg` are not unique"),
        ({"seg": np.zeros((H, W), np.int32)}, "`seg` is int32 with 2 dimensions; make it uint8 or uint16 with 2"),
        ({"inst": np.zeros((H, W), np.uint8)}, "`inst` is uint8 with 2 dimensions; make it uint8 or uint16 with 3"),
        ({"segments": (_segment(1), replace(_segment(2, "inst"), layer=1))}, "a layer that does not exist: 2"),
        ({"inst": INST, "segments": (_segment(1), replace(_segment(2, "inst"), layer=1))}, "not exist: 2"),
        ({"inst": INST, "segments": (_segment(1), _segment(0, "inst"))}, "an id below 1 or .*: 0"),
        ({"inst": np.full((1, H, W), 3, np.uint8)}, "`inst` has ids without a segment: 3"),
        (
            {"inst": np.stack([INST[0], INST[0] + 2]), "segments": (_segment(1), _segment(2, "inst"))},
            "in another .*: 2",
        ),
        ({"segments": (replace(_segment(1), is_thing=False),)}, "another `is_thing` than their category: 1"),
    ],
)
def test_invalid_custom_annotations_are_refused(changes, message):
    with pytest.raises(DataError, match=f"scans/a.png: .*{message}"):
        _read(_annotation(**changes))


@pytest.mark.parametrize("with_seg", [True, False])
def test_custom_images_without_instance_layers_are_read_back_with_an_empty_layer(tmp_path, with_seg):
    annotation = _annotation(inst=INST[:0]) if with_seg else Annotation(seg=None, inst=INST[:0], segments=())
    reader = CustomReader.of(TABLE, ("scans/a.png",), lambda _: (IMAGE, annotation), 10_000)
    manifest = write_dataset(reader, DatasetConfig(shards=str(tmp_path), source=CustomSource()), Storage())
    sample = manifest.read_sample(0, Storage())
    assert np.array_equal(sample.annotation.inst, INST)
    assert image_targets(sample, "instance", {1: 0}).labels.tolist() == []
    assert len(instance_truth(sample, {1: 0}).masks) == 0
    assert verify(str(tmp_path), Storage(), "full").faults == ()


def test_invalid_custom_images_are_refused():
    with pytest.raises(DataError, match=r"scans/a.png: it is not a JPEG, PNG, TIFF"):
        _read(_annotation(), b"GIF89a")
    with pytest.raises(DataError, match=r"scans/a.png: the image is 8 x 6 pixels, but its annotation is 9 x 6"):
        _read(_annotation(seg=np.pad(_annotation().seg, ((0, 0), (0, 1)))))
