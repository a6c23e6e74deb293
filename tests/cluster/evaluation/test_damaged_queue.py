import pytest

from m2f.cluster.evaluation.queue import read_entries
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.errors import EvaluationError


@pytest.mark.parametrize("content", ["", '[{"step": 4, "check', '[{"strange": 1}]', "7"])
def test_a_damaged_queue_is_one_message_with_its_remedy(tmp_path, content):
    path = tmp_path / "queue.json"
    path.write_text(content)
    with pytest.raises(
        EvaluationError, match=r"queue\.json: not a queue of evaluations .*; delete it to evaluate again"
    ):
        read_entries(Storage(), str(path))
