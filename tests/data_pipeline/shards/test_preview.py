import cv2
import numpy as np
import pytest

from m2f.data_pipeline.categories import Category, CategoryTable, drawn_name
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.sample import Annotation, Segment
from m2f.data_pipeline.shards.preview import (
    contact_sheet,
    draw_annotation,
    spread_indices,
    write_contact_sheet,
)
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage

TABLE = CategoryTable((Category(1, "ground", False, (0, 200, 0)), Category(2, "dog", True, (200, 0, 0))))


def segment(id_, category_id, map_, *, crowd=False, layer=0, area=1.0):
    return Segment(
        id=id_,
        category_id=category_id,
        is_thing=category_id == 2,
        is_crowd=crowd,
        area=area,
        bbox=(0.0, 0.0, 1.0, 1.0),
        source_id=id_,
        map=map_,
        layer=layer,
    )


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    source = SyntheticSource(num_images=7, seed=5)
    folder = tmp_path_factory.mktemp("shapes")
    return write_dataset(open_reader(source), DatasetConfig(shards=str(folder), source=source), Storage())


def test_the_sheet_shows_every_image_and_the_legend(shapes, tmp_path):
    url = str(tmp_path / "sheet.png")
    write_contact_sheet(shapes, spread_indices(shapes, 5), Storage(), url, columns=2)
    sheet = cv2.imread(url, cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(sheet, contact_sheet(shapes, spread_indices(shapes, 5), Storage(), columns=2))
    legend = sheet[-60:].reshape(-1, 3)
    shown = {int(c) for i in spread_indices(shapes, 5) for c in shapes.category_ids[i]}
    for category in shapes.categories.categories:
        swatch = (legend == category.color).all(axis=1).sum()
        assert (swatch >= 100) == (category.id in shown), category.name


def test_indices_are_spread_and_bounded(shapes):
    assert spread_indices(shapes, 3) == (0, 3, 6)
    assert spread_indices(shapes, 100) == tuple(range(7))
    assert spread_indices(shapes, 1) == (0,)


def test_segments_are_tinted_and_void_is_unchanged():
    seg = np.zeros((200, 200), np.uint8)
    seg[:, 100:] = 1
    image = np.full((200, 200, 3), 100, np.uint8)
    drawn = draw_annotation(image, Annotation(seg=seg, inst=None, segments=(segment(1, 1, "seg"),)), TABLE)
    assert (drawn[:, :90] == 100).all()
    assert drawn[20, 150].tolist() == [45, 155, 45]
    assert (image == 100).all()


def test_every_segment_has_a_band_in_the_colour_of_the_legend():
    """This includes classes with many instances, whose tint is blended with the image."""
    inst = np.zeros((1, 60, 200), np.uint8)
    for number in range(5):
        inst[0, 10:50, 40 * number + 4 : 40 * number + 36] = number + 1
    segments = tuple(segment(number + 1, 2, "inst", area=1280.0) for number in range(5))
    drawn = draw_annotation(
        np.full((60, 200, 3), 90, np.uint8), Annotation(seg=None, inst=inst, segments=segments), TABLE
    )
    in_color = (drawn == TABLE.by_id[2].color).all(axis=2)
    assert all((in_color & (inst[0] == s.id)).sum() > 200 for s in segments)


def test_instances_are_drawn_instead_of_the_things_of_the_map():
    seg = np.full((200, 200), 1, np.uint8)
    seg[50:100, 50:100] = 2
    inst = np.zeros((2, 200, 200), np.uint8)
    inst[0, 50:180, 50:180] = 1
    inst[1, 60:80, 60:80] = 2
    segments = (
        segment(1, 1, "seg"),
        segment(2, 2, "seg"),
        segment(1, 2, "inst", area=16900.0),
        segment(2, 2, "inst", layer=1, area=400.0, crowd=True),
    )
    annotation = Annotation(seg=seg, inst=inst, segments=segments)
    drawn = draw_annotation(np.zeros((200, 200, 3), np.uint8), annotation, TABLE)
    red, green = drawn[170, 170, :2]
    assert red > green  # the instance is larger than the segment of the map
    red, green = drawn[30, 30, :2]
    assert green > red
    assert (drawn[62:78, 62:78] == 255).all(axis=2).any()  # the crowd is hatched


@pytest.mark.parametrize(
    ("name", "drawn"), [("cell?", "cell?"), ("Gr\u00fcner Fleck", "7: Gruner Fleck"), ("\u7ec6\u80de", "7: ??")]
)
def test_names_that_the_font_cannot_draw_have_their_id(name, drawn):
    assert drawn_name(Category(7, name, True, (0, 0, 0))) == drawn
