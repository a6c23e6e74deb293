"""XML from untrusted files. Parsing has bounded cost and raises one type of error."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers.files import read_bytes, require_file

MAX_XML_BYTES = 1_000_000_000
"""Upper limit of a file, because its tree needs several times as much memory."""
MAX_XML_DEPTH = 32
"""Upper limit of nested levels. Files of CVAT and VOC have fewer than ten."""


def read_xml(path: str) -> Element:
    """Return the root of an XML file.

    Raises:
        DataError: the file is invalid, too large, nested too deeply or declares a document type. Without such a
            declaration there are no custom entities, which could expand without bound or read other files.
    """
    require_file(path)
    if (size := Path(path).stat().st_size) > MAX_XML_BYTES:
        raise DataError(f"{path} has {size} bytes; the limit is {MAX_XML_BYTES}, export it in parts")
    builder = TreeBuilder()
    depth = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_XML_DEPTH:
            raise DataError(f"{path}: elements are nested deeper than {MAX_XML_DEPTH} levels")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: object) -> NoReturn:
        raise DataError(f"{path} declares a document type (DOCTYPE), which annotation tools do not write; remove it")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
    try:
        parser.Parse(read_bytes(Path(path)), True)
    except (expat.ExpatError, LookupError, ValueError) as error:
        raise DataError(f"{path} is not valid XML: {error}") from error
    return builder.close()
