"""Files that `m2f compare` cannot write."""

from m2f.cluster.cli import main
from tests.cluster.compare.test_compare import write_run


def test_outputs_that_cannot_be_written_are_user_errors(tmp_path, capsys):
    folders = [write_run(tmp_path / name, name, pq) for name, pq in (("a", 50.0), ("b", 51.0))]
    (tmp_path / "file").write_text("")
    (tmp_path / "r_curves.svg").mkdir()
    for path, message in (
        (tmp_path, f"--output {tmp_path}: this is a folder"),
        (tmp_path / "file/sub/r.md", f"--output {tmp_path}/file/sub/r.md: {tmp_path}/file is not a folder"),
    ):
        assert main(["compare", *folders, "--output", str(path)]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert "51.00" not in printed.out
    assert main(["compare", *folders, "--output", str(tmp_path / "r.md")]) == 2
    printed = capsys.readouterr()
    assert f"--output: {tmp_path}/r_curves.svg cannot be written: Is a directory" in printed.err
    assert "51.00 +1.00*" in printed.out
