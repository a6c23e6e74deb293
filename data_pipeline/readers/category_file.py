"""Read the user's file of classes in label maps: a JSON list of {label, name, color, isthing}."""

from __future__ import annotations

from collections.abc import Collection

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.json_fields import field, optional_flag, read_flag
from m2f.data_pipeline.readers.coco_json import category_id, read_color
from m2f.data_pipeline.readers.files import read_json


def read_category_file(
    path: str, void: Collection[int], *, things: bool | None = None
) -> tuple[CategoryTable, frozenset[int]]:
    """Return the categories in the order of the file, and all void labels.

    The file may also be a COCO file with `categories`, or a list of COCO categories; their `id` is then the label.

    Args:
        path: the JSON file.
        void: labels that are void, in addition to entries with `"ignore": true`.
        things: whether entries without `isthing` are things. If None, such entries are errors.

    Raises:
        DataError: an entry is invalid, the label of a category is in `void`, or there is no category.
    """
    document = read_json(path)
    entries = document.get("categories") if isinstance(document, dict) else document
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} is not a list of {{label, name, color, isthing}}")
    categories, ignored = [], set(void)
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        id_field = "id" if isinstance(entry, dict) and "label" not in entry and "id" in entry else "label"
        value = category_id(entry, id_field, where)
        if optional_flag(entry, "ignore", where):
            ignored.add(value)
            continue
        name = str(field(entry, "name", where))
        is_thing = things if things is not None and "isthing" not in entry else read_flag(entry, "isthing", where)
        if value in void:
            raise DataError(
                f"{where}: {value} is the label of {name!r} and in the list of void labels (source.void, or --void of "
                f'`m2f index`); remove it from that list, or mark the entry with "ignore": true'
            )
        categories.append(Category(value, name, is_thing, read_color(entry, number, where)))
    if not categories:
        raise DataError(f"{path} defines no category except void")
    return CategoryTable(tuple(categories)), frozenset(ignored)
