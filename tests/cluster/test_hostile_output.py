"""Tests that names with control sequences are escaped in terminals, logs and pages."""

import io
import logging

import pytest

from m2f.cluster.cli import main
from m2f.cluster.doctor.doctor import print_findings
from m2f.cluster.doctor.finding import Finding
from m2f.cluster.exit_status import MEANINGS, ExitStatus
from m2f.cluster.terminal import Progress, print_err, print_out
from m2f.data_pipeline.printable import printable
from m2f.eval.report.page import Section, page
from m2f.trainer.reporting import LogReporter, Notice

CONTROL_SEQUENCE = "\x1b[2J\x1b]0;owned\x07"
HOSTILE = f"a{CONTROL_SEQUENCE}\x9b31m\u202eb\udcff\r"
ESCAPED = "a\\x1b[2J\\x1b]0;owned\\x07\\x9b31m\\u202eb\\udcff\\r"


def test_printable_escapes_terminal_control_sequences():
    assert printable(HOSTILE) == ESCAPED
    assert printable("usual\ttext\nof lines, äöü 漢字 ┃ 1 ≤ 2") == "usual\ttext\nof lines, äöü 漢字 ┃ 1 ≤ 2"
    assert printable("\x1b[36mred\x1b[0m\x1b[2J", colors=True) == "\x1b[36mred\x1b[0m\\x1b[2J"


def test_lines_progress_and_events_are_printable(capsys):
    print_out(HOSTILE)
    print_err(HOSTILE)
    LogReporter(9, stream := io.StringIO()).report(Notice("spike", 1, HOSTILE))
    with Progress(HOSTILE, 3, "images", stream=stream) as progress:
        progress.note(HOSTILE)
        progress.advance(3)
    output = capsys.readouterr()
    assert output.out == output.err == f"{ESCAPED}\n"
    assert stream.getvalue().count(ESCAPED) == 3
    assert printable(stream.getvalue()) == stream.getvalue()


def test_findings_of_doctor_are_printable(capsys):
    print_findings([Finding("check", "failed", HOSTILE, HOSTILE)])
    output = capsys.readouterr().out
    assert printable(output) == output
    assert "owned" in output


@pytest.mark.parametrize(
    "words", [["stats", f"/nowhere/{HOSTILE}"], ["verify", HOSTILE], ["train", HOSTILE], [HOSTILE]]
)
def test_verbs_print_hostile_arguments_as_escapes(capsys, words):
    main(words)
    output = capsys.readouterr()
    assert printable(output.out + output.err) == output.out + output.err
    assert "\\x1b[2J" in output.out + output.err


def test_options_and_warnings_are_printable(capsys):
    with pytest.raises(SystemExit):
        main(["stats", f"--{HOSTILE}"])
    assert main(["stats", "/nowhere"]) == ExitStatus.USER_ERROR
    assert logging.lastResort is not None
    record = logging.LogRecord("m2f", logging.WARNING, "", 0, "%s", (HOSTILE,), None)
    assert logging.lastResort.format(record) == ESCAPED
    output = capsys.readouterr()
    assert printable(output.out + output.err) == output.out + output.err


def test_pages_are_printable():
    html = page(HOSTILE, HOSTILE, [Section(HOSTILE, HOSTILE)])
    assert printable(html) == html


def test_help_shows_the_meaning_of_every_exit_status(capsys):
    assert main(["--help"]) == ExitStatus.DONE
    output = capsys.readouterr().out
    assert set(MEANINGS) == set(ExitStatus)
    assert all(f"  {status.value:<11}{meaning}" in output for status, meaning in MEANINGS.items())
