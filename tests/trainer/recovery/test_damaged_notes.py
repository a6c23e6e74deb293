"""JSON files of a run folder that were truncated or edited by hand, or that the store does not return."""

import pytest

from m2f.data_pipeline.errors import OutageError
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.errors import ConfigError
from m2f.trainer.checkpoint.commits import read_metrics, write_metrics
from m2f.trainer.checkpoint.folder import read_receipt
from m2f.trainer.recovery.adjustments import read_adjustments
from m2f.trainer.recovery.ending import Ending, read_ending, write_ending

SPAN = '{"micro_batch": 1, "skipped": [{"start": %s, "stop": 8}], "reasons": []}'


@pytest.mark.parametrize(
    "content",
    [
        '{"micro_batch": "x", "skipped": [], "reasons": []}',
        '{"micro_batch": 0, "skipped": [], "reasons": []}',
        '{"micro_batch": true, "skipped": [], "reasons": []}',
        '{"micro_batch": 1, "skipped": [7], "reasons": []}',
        SPAN % '"4"',
        SPAN % "-1",
        '{"micro_batch": 1, "skip',
        "",
    ],
)
def test_error_for_damaged_adjustments_states_the_remedy(tmp_path, content):
    (tmp_path / "adjustments.json").write_text(content)
    with pytest.raises(ConfigError, match=r"adjustments\.json cannot be read .*; repair it, or delete it"):
        read_adjustments(Storage(), str(tmp_path))


@pytest.mark.parametrize("content", ['{"kind": "stalled", "mess', '{"kind": "eaten", "message": ""}', "[]", ""])
def test_damaged_ending_is_ignored_with_a_warning(tmp_path, content, caplog):
    storage, folder = Storage(), str(tmp_path)
    write_ending(storage, folder, "whole", Ending("drained", "a machine goes"))
    storage.put(join(folder, "attempts/cut.json"), content.encode())
    assert read_ending(storage, folder, "whole") == Ending("drained", "a machine goes")
    assert read_ending(storage, folder, "cut") is None
    assert "attempts/cut.json" in caplog.text


@pytest.mark.parametrize("content", ['{"4": {"loss": 1.0}, "5', "[]", '{"4": 7}', '{"four": {"loss": 1.0}}'])
def test_damaged_metrics_are_left_out_with_a_warning(tmp_path, content, caplog):
    storage, folder = Storage(), str(tmp_path)
    write_metrics(storage, folder, 2, 1, {2: {"loss": 2.0}})
    storage.put(join(folder, "metrics/00000004-1.json"), content.encode())
    assert [points for _, points in read_metrics(storage, folder)] == [{2: {"loss": 2.0}}, {}]
    assert "00000004-1.json cannot be read" in caplog.text


class SilentStorage(Storage):
    """Local files whose content cannot be read."""

    def get(self, url):
        raise OutageError(f"{url}: no answer")


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("adjustments.json", read_adjustments),
        ("attempts/first.json", lambda storage, folder: read_ending(storage, folder, "first")),
        ("metrics/00000004-1.json", lambda storage, folder: list(read_metrics(storage, folder))),
        ("receipts/rank_00000.json", lambda storage, folder: read_receipt(storage, folder, 0)),
    ],
)
def test_a_file_that_the_store_does_not_return_counts_as_an_outage_and_not_as_damage(tmp_path, file, read):
    storage, folder = SilentStorage(), str(tmp_path)
    storage.put(join(folder, file), b"{}")
    with pytest.raises(OutageError, match="no answer"):
        read(storage, folder)
