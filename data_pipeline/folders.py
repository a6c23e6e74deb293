"""Walk through folders and the folders that they link to, because raw data is often linked from several disks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from m2f.data_pipeline.errors import DataError


def _refuse(error: OSError) -> None:
    """Raise DataError, unless the folder is `lost+found`, which is closed on every mounted disk and holds no data."""
    if not (isinstance(error, PermissionError) and os.path.basename(error.filename) == "lost+found"):
        raise DataError(f"{error.filename} cannot be read: {error.strerror}; correct its permissions, or move it")


def walk_folders(root: str, on_error: Callable[[OSError], None] = _refuse) -> Iterator[tuple[str, list[str]]]:
    """Yield the path of each folder below `root` (with `root`) and the names of its files, links to files included.

    Links to folders are followed, after all other folders. Each folder is listed once, even if several links or a loop
    of links lead to it. A link therefore adds nothing if its target is below `root` anyway.

    Args:
        root: path of a folder.
        on_error: called if a folder cannot be read, which is then left out. The default raises DataError, except for
            a `lost+found` without permission.
    """
    seen: set[str] = set()
    trees = [root]
    for tree in trees:  # grows inside the loop
        for folder, subfolders, names in os.walk(tree, onerror=on_error):
            if (target := os.path.realpath(folder)) in seen:
                subfolders.clear()
                continue
            seen.add(target)
            yield folder, names
            subfolders.sort()  # if two links have the same target, the first name counts on every machine
            trees += [path for name in subfolders if os.path.islink(path := os.path.join(folder, name))]


def list_files(root: Path) -> list[Path]:
    """Return the files in a folder and its subfolders, sorted. Links are followed as in `walk_folders`.

    Raises DataError if a folder cannot be read.
    """
    return sorted(Path(folder, name) for folder, names in walk_folders(str(root)) for name in names)
