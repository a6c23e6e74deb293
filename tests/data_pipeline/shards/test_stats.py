import numpy as np
import pytest

from m2f.data_pipeline.config import DatasetConfig, SyntheticSource
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.stats import class_table, format_class_table
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.storage.storage import Storage


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    source = SyntheticSource(num_images=12, seed=9)
    folder = tmp_path_factory.mktemp("shapes")
    return write_dataset(open_reader(source), DatasetConfig(shards=str(folder), source=source), Storage())


def test_the_table_equals_a_count_over_the_decoded_samples(shapes):
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


def test_the_text_is_aligned_and_ends_with_totals(shapes):
    rows = class_table(shapes)
    lines = format_class_table(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[:2] == ["class", "kind"]
    assert lines[-1].startswith(f"total of {len(rows)} classes")
    assert f"{np.sum([row.num_segments for row in rows]):,}" in lines[-1]
