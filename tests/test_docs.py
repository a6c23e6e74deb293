"""The written documentation agrees with the code."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.explain import explain

REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_settings_are_described_as_they_are():
    written = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert written.strip() == explain().strip(), "run `make docs`"


def test_links_between_documents_lead_somewhere():
    for document in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"
