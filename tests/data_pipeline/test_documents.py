"""Hostile JSON and YAML is refused with one error, before it costs memory or time."""

import json
import re

import pytest

from m2f.cluster.compare.errors import CompareError
from m2f.cluster.compare.records import read_runs
from m2f.cluster.compare.set_result import parse_results
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


RESULTS = {
    "step": 100,
    "fingerprint": "ab",
    "subset": None,
    "num_images": 6,
    "metrics": {"AP": 20.0, "APl": None, "AP50": 3},
    "per_class": [{"id": 1, "name": "cat", "is_thing": True, "AP": 20.0, "PQ": None}],
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"step": "x"}, "`step` is 'x'"),
        ({"step": True}, "`step` is True"),
        ({"step": 10**400}, "`step` is 1000"),
        ({"step": -1}, "`step` is -1"),
        ({"fingerprint": None}, "`fingerprint` is None"),
        ({"subset": 5}, "`subset` is 5"),
        ({"num_images": "6"}, "`num_images` is '6'"),
        ({"metrics": [1]}, "`metrics` is [1]"),
        ({"metrics": {"AP": "20"}}, "`AP` is '20'"),
        ({"metrics": {"AP": True}}, "`AP` is True"),
        ({"metrics": {"AP": 10**400}}, "`AP` is 1000"),
        ({"per_class": None}, "`per_class` is None"),
        ({"per_class": ["x"]}, "`per_class` has 'x'"),
        ({"per_class": [{"AP": 3.0}]}, "`per_class` has {'AP': 3.0}"),
        ({"per_class": [{"name": "cat", "AP": "x"}]}, "`AP` is 'x'"),
        ({"per_class": [{"name": 3}]}, "`name` is 3"),
        ({"per_class": [{"name": "cat", "id": [1], "is_thing": True}]}, "`id` is [1]"),
        ({"per_class": [{"name": "cat", "id": 1, "is_thing": "yes"}]}, "`is_thing` is 'yes'"),
        ({"settings": "x"}, "`settings` is 'x'"),
    ],
)
def test_results_of_another_type_are_refused_with_field_and_value(change, problem):
    message = f"val/results.json is damaged ({problem}"
    with pytest.raises(CompareError, match=re.escape(message)):
        parse_results(json.dumps(RESULTS | change), "val/results.json")


def test_the_message_about_damaged_results_names_the_file(tmp_path):
    file = tmp_path / "evaluations/step_00000100/val/results.json"
    file.parent.mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text("name: run\n")
    text = json.dumps(RESULTS)
    assert parse_results("\ufeff" + text, "val/results.json").per_class == RESULTS["per_class"]
    for content in (b"\xff" + text.encode(), text.encode().replace(b'"cat"', b'"c\xe9t"'), b"[]"):
        file.write_bytes(content)
        with pytest.raises(CompareError, match=f"{re.escape(str(file))} is damaged .*; delete it, and evaluate again"):
            read_runs([str(tmp_path)], tracking=None, experiment=None, query=None, step=None)


@pytest.mark.parametrize("text", ["[" * 200_000, "[" + "9" * 30 + "]", "[1]", "{}"])
def test_damaged_results_and_queues_are_refused(tmp_path, text):
    (tmp_path / "queue.json").write_text(text)
    with pytest.raises(CompareError, match=r"val/results\.json is damaged"):
        parse_results(text, "val/results.json")
    if text != "{}":  # {} is a valid, empty queue
        with pytest.raises(EvaluationError, match=r"is not a valid evaluation queue"):
            read_entries(Storage(), str(tmp_path / "queue.json"))
