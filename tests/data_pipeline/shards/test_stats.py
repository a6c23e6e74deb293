import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.columns import SAMPLE_SCHEMA, Columns
from m2f.data_pipeline.shards.manifest import write_table
from m2f.data_pipeline.shards.stats import class_table, format_class_table, pixels_note
from m2f.data_pipeline.shards.verify import verify
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage
from tests.data_pipeline.coco_set import CocoSet, H, W


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    source = SyntheticSource(num_images=12, seed=9)
    folder = tmp_path_factory.mktemp("shapes")
    return write_dataset(open_reader(source), DatasetConfig(shards=str(folder), source=source), Storage())


def test_class_table_equals_a_count_over_the_decoded_samples(shapes):
    samples = [shapes.read_sample(i, Storage()) for i in range(shapes.num_samples)]
    pixels = sum(s.image[..., 0].size for s in samples)
    for row, category in zip(class_table(shapes), shapes.categories.categories, strict=True):
        segments = []
        for number, sample in enumerate(samples):
            kind = "inst" if category.is_thing and sample.annotation.inst is not None else "seg"
            segments += [
                (number, s.area)
                for s in sample.annotation.segments
                if s.category_id == category.id and s.map == kind and not s.is_crowd
            ]
        assert (row.name, row.is_thing) == (category.name, category.is_thing)
        assert row.num_segments == len(segments)
        assert row.num_images == len({number for number, _ in segments})
        assert row.image_share == pytest.approx(row.num_images / 12)
        assert row.pixel_share == pytest.approx(sum(area for _, area in segments) / pixels, abs=1e-4)


def test_class_table_text_is_aligned_and_ends_with_totals(shapes):
    rows = class_table(shapes)
    lines = format_class_table(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[:2] == ["class", "kind"]
    assert lines[-1].startswith(f"total of {len(rows)} classes")
    assert f"{np.sum([row.num_segments for row in rows]):,}" in lines[-1]


def _write(coco, kind):
    coco.write()
    source = getattr(coco, f"{kind}_source")
    return write_dataset(open_reader(source), DatasetConfig(shards=f"{coco.root}/{kind}", source=source), Storage())


def _shares(manifest):
    return {row.name: round(row.pixel_share * H * W) for row in class_table(manifest)}


@pytest.mark.parametrize("factor", [0, 1 / 9, 1, 4])
def test_pixels_are_counted_regardless_of_stated_areas(tmp_path, factor):
    coco = CocoSet(tmp_path)
    for entry in (*coco.instances, *coco.panoptic[0]["segments_info"]):
        entry["area"] *= factor
    instances, panoptic = _write(coco, "instances"), _write(coco, "panoptic")
    assert _shares(instances) == {"cat": 10 * 7 + 6 * 10, "sky": 0}
    assert _shares(panoptic) == {"cat": 0, "sky": 19 * W - 5 * 10}
    assert pixels_note(instances) is pixels_note(panoptic) is None
    assert instances.category_areas.values.tolist() == [round(130.5 * factor)]


def test_manifests_without_pixel_counts_show_stated_areas_with_a_note(tmp_path):
    coco = CocoSet(tmp_path)
    coco.instances[0]["area"] = 7
    manifest = _write(coco, "instances")
    table = pq.read_table(f"{manifest.url}/samples.parquet").drop_columns(["category_pixels"])
    old = replace(manifest, columns=Columns(write_table(table)))
    assert _shares(old) == {"cat": 67, "sky": 0}
    assert "m2f shard --redo" in pixels_note(old)
    assert not verify(manifest.url, Storage(), "full").faults


def test_counts_that_differ_from_the_maps_are_faults(shapes, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shapes.url, folder)
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    rows[3]["category_pixels"][0] += 1
    data = write_table(pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA))
    (folder / "samples.parquet").write_bytes(data)
    document = json.loads((folder / "dataset.json").read_text())
    document["samples"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(document))
    (fault,) = verify(str(folder), Storage(), "full").faults
    assert fault.key == shapes.key[3]
    assert "its category_pixels is" in fault.problem
