"""Pack the upload of a Ray job: this machine's code of m2f and the recipe, in one archive.

Ray unpacks the archive in the working directory of the driver and of every worker, so all processes run the same code.
The archive does not contain libraries; they are part of the cluster's image or environment.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import m2f
from m2f.cluster.ray_private import pack_working_dir
from m2f.model.errors import UserError

PACKAGE = "m2f"
RECIPE = "recipe.yaml"
LIMIT_BYTES = 100 * 2**20
"""Maximum size of the archive in bytes. Ray's dashboard refuses larger requests with HTTP 413."""
IGNORE_FILE = ".rayignore"
_PROJECT_FILES = ("pyproject.toml", IGNORE_FILE)
_MAX_FOLDERS_LISTED = 5
"""Number of folders that the error message about a large upload lists."""
_RECIPE_TIME = 946684800
"""Modification time of the recipe in the archive, 2000-01-01 (Unix time).

It is fixed, so that equal content results in an equal archive, which Ray uploads only once."""


class UploadError(UserError):
    """The upload to a cluster is too large."""


def pack(folder: Path, recipe: str | None, code: bool = True, source: Path | None = None) -> Path:
    """Create an archive of the code and the recipe, and return its path. `.rayignore` beside the code excludes files.

    Args:
        folder: folder in which the archive is created.
        recipe: complete recipe as YAML; None for jobs without a recipe.
        code: whether to include the code; False for clusters on which m2f is installed.
        source: folder that contains `m2f`; None uses the one of this module.

    Raises:
        UploadError: the archive exceeds `LIMIT_BYTES`; the message names the largest folders.
    """
    staged, archive = folder / "working_dir", folder / "m2f.zip"
    staged.mkdir()
    if code:
        _copy_code(source or m2f.ROOT, staged)
    if recipe is not None:
        path = staged / RECIPE
        path.write_text(recipe, encoding="utf-8")
        os.utime(path, (_RECIPE_TIME, _RECIPE_TIME))
    pack_working_dir(staged, archive)
    _check_size(archive)
    return archive


def _copy_code(source: Path, staged: Path) -> None:
    # In a checkout, the subfolders of `m2f` are symbolic links, which copytree follows. On systems where git creates
    # no links, they are text files and are replaced by the folders here.
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source / PACKAGE, staged / PACKAGE, ignore=ignore)
    for link_file in (staged / PACKAGE).iterdir():
        if link_file.is_file() and link_file.suffix != ".py" and (source / link_file.name).is_dir():
            link_file.unlink()
            shutil.copytree(source / link_file.name, link_file, ignore=ignore)
    for name in _PROJECT_FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, staged / name)


def _check_size(archive: Path) -> None:
    size = archive.stat().st_size
    if size <= LIMIT_BYTES:
        return
    folders: Counter[str] = Counter()
    with zipfile.ZipFile(archive) as members:
        for member in members.infolist():
            folders[str(Path(member.filename).parent)] += member.compress_size
    largest = ", ".join(f"{name} ({_mib(size)})" for name, size in folders.most_common(_MAX_FOLDERS_LISTED))
    raise UploadError(
        f"the code to upload is {_mib(size)}, but Ray accepts at most {_mib(LIMIT_BYTES)}. Largest folders: {largest}. "
        f"Move data out of the code, or list it in {IGNORE_FILE} beside pyproject.toml"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
