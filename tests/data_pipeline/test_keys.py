"""Which keys are safe to use in paths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.keys import MAX_KEY_LENGTH, check_key, key_problem


@pytest.mark.parametrize(
    "key",
    [
        "000000000139",
        "a/b/c",
        "aachen_000000_000019",
        "-1",
        ".hidden",
        "a..b",
        "...",
        "été 1",
        "x" * MAX_KEY_LENGTH,
        "a b.c",
    ],
)
def test_valid_keys_are_accepted(key):
    assert key_problem(key) is None
    assert check_key(key, "here") == key


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        *[(key, "is not a path inside its folder") for key in ("..", ".", "../x", "a/../x", "/x", "a//b", "a/", "./a")],
        *[(key, "contains the character") for key in ("a\\b", "a\x00b", "a\x1b[31m", "a\nb", "a\udcff", "a\x9b")],
        *[(key, "is not a non-empty string") for key in ("", None, 3, b"a", ["a"])],
        ("x" * (MAX_KEY_LENGTH + 1), "has 1001 characters"),
    ],
)
def test_invalid_keys_are_refused_with_a_printable_message(key, problem):
    with pytest.raises(DataError, match=rf"^file.json: the name .* {problem}") as caught:
        check_key(key, "file.json")
    assert str(caught.value).isprintable()


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b.c", "..."]), min_size=1).map("/".join))
def test_valid_keys_stay_inside_their_folder(tmp_path_factory, key):
    folder = tmp_path_factory.getbasetemp() / "folder"
    if key_problem(key) is None:
        assert (folder / key).resolve().is_relative_to(folder)
        assert (folder / key).resolve() != folder
