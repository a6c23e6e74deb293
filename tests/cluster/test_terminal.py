"""Progress of long work on a terminal and in a log."""

from m2f.cluster.terminal import Progress, describe_pace, format_duration


def test_rates_and_durations_are_formatted():
    assert format_duration(42) == "0:42"
    assert format_duration(3 * 3600 + 7 * 60 + 9) == "3:07:09"
    assert describe_pace(done=30, total=90, done_before=10, elapsed_s=10.0, unit="images") == "2.0 images/s, 0:30 left"
    assert describe_pace(done=30, total=90, done_before=10, elapsed_s=0.0, unit="images") == "- images/s"
    assert describe_pace(done=10, total=90, done_before=10, elapsed_s=10.0, unit="images") == "- images/s"


def test_the_last_line_of_progress_is_printed_once(capsys):
    now = [0.0]
    with Progress("sharding", 2, "images", interval_s=10, clock=lambda: now[0]) as progress:
        now[0] = 20.0
        progress.advance(2)
    assert capsys.readouterr().err == "sharding: 2/2 images, 0.1 images/s, 0:00 left\n"


def test_progress_without_a_terminal_prints_a_line_per_interval(capsys):
    now = [0.0]
    with Progress("sharding", 100, "images", interval_s=10, clock=lambda: now[0]) as progress:
        for second in range(1, 26):
            now[0] = float(second)
            progress.advance(4)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "sharding: 40/100 images, 4.0 images/s, 0:15 left",
        "sharding: 80/100 images, 4.0 images/s, 0:05 left",
        "sharding: 100/100 images, 4.0 images/s, 0:00 left",
    ]
