"""`m2f index` reports each hostile tar with one message, in bounded memory."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

MAIN = Path(__file__).with_name("hostile_tar_main.py")
MAX_MB = 150
"""Upper limit of memory. The files would need much more; an ordinary tar needs a few MB."""


def sample_bytes(name):
    """Return the tar blocks of one sample, an image and a label map."""
    image = cv2.imencode(".jpg", np.full((8, 9, 3), 90, np.uint8))[1].tobytes()
    labels = cv2.imencode(".png", np.ones((8, 9), np.uint8))[1].tobytes()
    return member(f"{name}.jpg", image) + member(f"{name}.png", labels)


def member(name, content=b"", *, kind=tarfile.REGTYPE, size=None):
    """Return the tar blocks of one member. `size` overrides the size in the header."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def pax(records, kind=tarfile.XHDTYPE):
    """Return a pax extended header with arbitrary (keyword, value) bytes."""
    content = b""
    for keyword, value in records:
        length = len(keyword) + len(value) + 3
        length += len(str(length + len(str(length))))
        content += b"%d %s=%s\n" % (length, keyword, value)
    return member("pax", content, kind=kind)


def sparse_old():
    """Return an old GNU sparse header whose map continues in every following block."""
    header = bytearray(member("s.jpg", kind=tarfile.GNUTYPE_SPARSE))
    header[482] = 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + (b"7" * 504 + b"\1" + bytes(7)) * 100


END = bytes(1024)
MB = 1_000_000
# name: (parts of the file, where a number is a count of zero bytes; expected problem; number of samples)
HOSTILE = {
    "sparse map": (
        [
            sample_bytes("a"),
            sample_bytes("b"),
            pax([(b"GNU.sparse.map", b"x,y")]),
            member("s.jpg"),
            sample_bytes("c"),
            END,
        ],
        "not a regular file",
        3,
    ),
    "sparse 1.0": (
        [
            sample_bytes("a"),
            sample_bytes("b"),
            pax([(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")]),
            member("s.jpg"),
            sample_bytes("c"),
            END,
        ],
        "not a regular file",
        3,
    ),
    "sparse size": (
        [sample_bytes("a"), sample_bytes("b"), pax([(b"GNU.sparse.size", b"x")]), member("s.jpg"), END],
        "damaged here",
        1,
    ),
    "sparse old": (
        [sample_bytes("a"), sample_bytes("b"), sparse_old(), sample_bytes("c"), END],
        "not a regular file",
        2,
    ),
    "name not UTF-8": (
        [
            sample_bytes("a"),
            sample_bytes("b"),
            pax([(b"path", b"\xff\xfe.jpg")]),
            member("x.jpg"),
            sample_bytes("c"),
            END,
        ],
        "character",
        3,
    ),
    "binary names": (
        [
            sample_bytes("a"),
            sample_bytes("b"),
            pax([(b"hdrcharset", b"BINARY"), (b"path", b"\xe4.jpg")]),
            member("x.jpg"),
            sample_bytes("c"),
            END,
        ],
        "character",
        3,
    ),
    "charset": (
        [sample_bytes("a"), sample_bytes("b"), pax([(b"hdrcharset", b"\xff")]), member("x.jpg"), END],
        "damaged here",
        1,
    ),
    "keyword not UTF-8": (
        [sample_bytes("a"), sample_bytes("b"), pax([(b"\xff\xfe", b"v")]), sample_bytes("c"), END],
        None,
        3,
    ),
    "huge header": (
        [sample_bytes("a"), sample_bytes("b"), member("p", kind=tarfile.XHDTYPE, size=300 * MB), 300 * MB],
        "300000000 bytes",
        1,
    ),
    "huge global": (
        [sample_bytes("a"), sample_bytes("b"), member("p", kind=tarfile.XGLTYPE, size=300 * MB), 300 * MB],
        "300000000 bytes",
        1,
    ),
    "huge name": (
        [sample_bytes("a"), sample_bytes("b"), member("p", kind=tarfile.GNUTYPE_LONGNAME, size=300 * MB), 300 * MB],
        "300000000",
        1,
    ),
    "huge first": ([member("p", kind=tarfile.XHDTYPE, size=300 * MB), 300 * MB], "300000000 bytes", None),
    "many names": (
        [sample_bytes("a"), sample_bytes("b"), member("n", b"x" * 9, kind=tarfile.GNUTYPE_LONGNAME) * 5000, END],
        "follow each",
        1,
    ),
    "many headers": (
        [sample_bytes("a"), sample_bytes("b"), pax([(b"a", b"b")]) * 5000, member("x.jpg"), END],
        "follow each other",
        1,
    ),
    "many globals": (
        [
            sample_bytes("a"),
            sample_bytes("b"),
            *(pax([(b"%d" % i, b"v" * 5000)], tarfile.XGLTYPE) + member(f"{i}", b"") for i in range(99)),
            END,
        ],
        "global headers have more than",
        2,
    ),
    "digits": (
        [sample_bytes("a"), sample_bytes("b"), pax([(b"a", b"9" * 60_000)]), member("x.jpg"), END],
        "more than 30 digits",
        1,
    ),
    "negative": (
        [sample_bytes("a"), sample_bytes("b"), pax([(b"size", b"-9999999")]), member("x.jpg"), END],
        "negative",
        1,
    ),
    "a little negative": (
        [sample_bytes("a"), sample_bytes("b"), pax([(b"size", b"-600")]), member("x.jpg"), END],
        "negative",
        1,
    ),
    "size of no end": (
        [sample_bytes("a"), sample_bytes("b"), pax([(b"size", b"9" * 29)]), member("x.jpg"), END],
        "is truncated: its header",
        1,
    ),
    "large member": (
        [sample_bytes("a"), sample_bytes("b"), member("x.jpg", size=300 * MB), 300_000_256, sample_bytes("c"), END],
        "the limit is",
        3,
    ),
    "large sample": (
        [
            sample_bytes("a"),
            *(part for i in range(6) for part in (member(f"x.{i}", size=51_200_000), 51_200_000)),
            sample_bytes("c"),
            END,
        ],
        "its files have more than",
        2,
    ),
    "many folders": (
        [sample_bytes("a"), sample_bytes("b"), member("f/", kind=tarfile.DIRTYPE) * 400_000, sample_bytes("c"), END],
        None,
        3,
    ),
}


@pytest.mark.parametrize(("parts", "problem", "count"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_tar_is_a_fault_at_bounded_cost(tmp_path, parts, problem, count):
    (tmp_path / "classes.json").write_text('[{"label": 1, "id": 1, "name": "a", "isthing": 0}]')
    with (tmp_path / "hostile.tar").open("wb") as file:
        for part in parts:
            file.seek(part, io.SEEK_CUR) if isinstance(part, int) else file.write(part)
        file.truncate()
    command = [sys.executable, MAIN, tmp_path / "hostile.tar", tmp_path / "classes.json"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(process.stdout)
    assert result["mb"] < MAX_MB
    assert result.get("keys") == count
    problems = result["error"] if count is None else " ".join(result["faults"])
    assert problem is None or problem in problems
    assert bool(problems) == (problem is not None), problems
