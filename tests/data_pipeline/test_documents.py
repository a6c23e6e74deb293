"""Hostile JSON and YAML is refused with one error, before it costs memory or time."""

import pytest

from m2f.cluster.compare.records import CompareError, parse_results
from m2f.cluster.evaluation.queue import read_entries
from m2f.cluster.recipe.load import load_recipe, parse_recipe
from m2f.cluster.recipe.same_model import model_changes
from m2f.data_pipeline.documents import MAX_YAML_BYTES, DocumentError, parse_json, parse_yaml
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.errors import EvaluationError
from m2f.model.errors import ConfigError


def aliases(first: str, row: str, count: int, times: int = 9) -> str:
    """Return `count` rows of YAML. Each row contains `times` aliases of the row before."""
    rows = [f"a0: &a0 {first}"]
    rows += [f"a{i}: &a{i} {row.format(', '.join([f'*a{i - 1}'] * times))}" for i in range(1, count)]
    return "\n".join(rows)


HOSTILE_YAML = {
    "laughs": (aliases("x", "[{}]", 10), "more than 100000 values"),
    "laughs in mappings": (aliases("x", "{{p: [{}], q: [*a0]}}", 10), "more than 100000 values"),
    "merged": (aliases("{k: 1}", "{{<<: [{}]}}", 10), "more than 100000 values"),
    "deep by aliases": (aliases("[x]", "[{}]", 3000, times=1), "nested deeper than 64"),
    "lists": ("[" * 200_000, "nested deeper than 64"),
    "mappings": ("{a: " * 200_000, "nested deeper than 64"),
    "block lists": ("- " * 200_000, "nested deeper than 64"),
    "block mappings": ("".join(f"{' ' * i}a:\n" for i in range(600)), "nested deeper than 64"),
    "in itself": ("a: &a [*a]", "an alias contains itself"),
    "deep in itself": ("a: &a {b: {c: *a}}", "an alias contains itself"),
    "long": ("x" * (MAX_YAML_BYTES + 1), "bytes; the limit is"),
    "integer": ("a: " + "9" * 25, "more than 64 bits"),
    "long integer": ("a: " + "9" * 5000, "4300 digits"),
    "base 60": ("a: 1" + ":1" * 5000, "more than 64 bits"),
    "date": ("a: 2001-99-99", "month"),
    "tag bool": ("!!bool maybe", "maybe"),
    "tag int": ("!!int x", "invalid literal"),
    "tag date": ("!!timestamp x", "."),
    "code": ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "list as key": ("[1]: 2", "unhashable"),
    "twice": ("a: 1\na: 2", "written twice"),
    "escape": ("\x1b[2J: 1", "special characters"),
    "no text": (b"\xff\xfe\x00", "."),
}


@pytest.mark.parametrize(("text", "problem"), HOSTILE_YAML.values(), ids=HOSTILE_YAML)
def test_hostile_yaml_is_refused(text, problem):
    with pytest.raises(DocumentError, match=problem):
        parse_yaml(text)


@pytest.mark.parametrize("text", [HOSTILE_YAML["laughs"][0], "[" * 200_000, "!!int x", "a: 2001-99-99"])
def test_hostile_yaml_is_refused_wherever_recipes_are_read(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"recipe.yaml: not valid YAML"):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match="the recipe of the weights is not valid YAML"):
        model_changes(text, "{}")
    recipe = "name: a\ndatasets: {a: {shards: s}}\ndata: {train: [{dataset: a}]}\ntraining: {max_steps: 1}"
    assert parse_recipe(recipe).name == "a"
    with pytest.raises(ConfigError, match="the value is not valid YAML"):
        parse_recipe(recipe, [f"name={text}"])


def test_small_anchors_and_merges_are_read():
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: [*a, *a]}") == {"a": {"x": 1}, "b": {"x": 1, "y": [{"x": 1}] * 2}}
    assert parse_yaml("") is None
    assert parse_yaml("a: [1, -9223372036854775808, 18446744073709551615, 0x10]")["a"][1:] == [-(2**63), 2**64 - 1, 16]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ('[{"a": ' * 50_000, "nested too deeply"),
        ("9" * 10_000, "4300 digits"),
        ('{"id": ' + "9" * 10_000 + "}", "4300 digits"),
        (b"\xff", "."),
        ("", "Expecting value"),
    ],
)
def test_hostile_json_is_refused(text, problem):
    with pytest.raises(DocumentError, match=problem):
        parse_json(text)


def test_valid_json_is_read_unchanged():
    assert parse_json("[100000000000000000000000]") == [10**23]
    assert parse_json('[18446744073709551615, 0.12345678901234567890123, "99999999999999999999", 1e25]') == [
        2**64 - 1,
        0.12345678901234567890123,
        "99999999999999999999",
        1e25,
    ]


@pytest.mark.parametrize("text", ["[" * 200_000, "[" + "9" * 30 + "]", "[1]", "{}"])
def test_damaged_results_and_queues_are_refused(tmp_path, text):
    (tmp_path / "queue.json").write_text(text)
    with pytest.raises(CompareError, match=r"a results.json is damaged"):
        parse_results(text)
    if text != "{}":  # {} is a valid, empty queue
        with pytest.raises(EvaluationError, match=r"is not a valid evaluation queue"):
            read_entries(Storage(), str(tmp_path / "queue.json"))
