"""A manifest cannot name files outside its checkpoint."""

import json

import pytest

from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.checkpoint.folder import (
    MANIFEST,
    CheckpointManifest,
    FileEntry,
    checkpoint_url,
    read_manifest,
    read_receipt,
    receipt_url,
    verify_sizes,
)
from m2f.trainer.errors import CheckpointError


@pytest.mark.parametrize("path", ["engine/../../../x.pt", "/etc/x", "engine//x.pt", "rng\\x.pt", "x\x1b[2J", ""])
def test_paths_outside_the_checkpoint_are_refused(tmp_path, path):
    storage, url = Storage(), checkpoint_url(str(tmp_path / "run"), 3)
    files = {"state.json": FileEntry(2, "a"), path: FileEntry(2, "a")}
    storage.put(join(url, MANIFEST), CheckpointManifest(3, 1, 1, files).to_json())
    for read in (read_manifest, verify_sizes):
        with pytest.raises(
            CheckpointError, match=r"manifest.json cannot be read \(the file name '.*\); resume"
        ) as caught:
            read(storage, url)
        assert str(caught.value).isprintable()
    receipt = {"attempt": "a", "files": {path: {"size": 2, "sha256": "a"}}}
    storage.put(receipt_url(url, 0), json.dumps(receipt).encode())
    with pytest.raises((CheckpointError, ValueError), match="the file name"):
        read_receipt(storage, url, 0)
