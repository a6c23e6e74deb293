"""Tests of early stopping, which is a function of the entries of the evaluation queue."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2f.cluster.evaluation.early_stopping import early_stop, unknown_metrics
from m2f.cluster.evaluation.queue import Entry
from m2f.cluster.recipe.devices import AvailableDevices
from m2f.cluster.recipe.load import parse_recipe
from m2f.cluster.start.settling import settled_run
from m2f.model.errors import ConfigError
from m2f.trainer.config import CheckpointConfig, EarlyStoppingConfig, TrainingConfig

CONFIG = EarlyStoppingConfig(metric="val/PQ", patience=2, min_delta=1.0)
RECIPE = """
name: early
datasets: {train: {shards: shards/train}, val: {shards: shards/val}}
data: {train: [{dataset: train}]}
"""


def entry(step, value=None, status="published", metric="val/PQ"):
    return Entry(step, f"checkpoints/{step}", 0, status, metrics={} if value is None else {metric: value})


def make_entries(*values):
    return [entry(10 * (number + 1), value) for number, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ((), None),
        ((30.0, 31.0), None),
        ((30.0, 31.0, 30.5), 30),  # a rise by exactly min_delta is not an improvement
        ((30.0, 31.1, 31.5, 32.2), None),
        ((30.0, 31.1, 31.5, 32.1), 40),
        ((30.0, 20.0, 20.0, 50.0), 30),  # later values do not change the decision
        ((30.0, None, 20.0), None),  # a checkpoint without the metric does not count
        ((30.0, float("nan"), 20.0, 20.0), 40),
    ],
)
def test_run_stops_when_patience_is_exhausted(values, step):
    found = early_stop(CONFIG, make_entries(*values))
    assert (found and found.step) == step


def test_reason_names_the_best_value_and_the_patience():
    found = early_stop(CONFIG, make_entries(30.0, 20.0, 20.0))
    assert found.reason == (
        "val/PQ has not risen above 30.00 (step 10) by more than 1 in 2 evaluations "
        "(training.early_stopping.patience 2)"
    )


def test_failed_dropped_and_withdrawn_checkpoints_do_not_count():
    others = [entry(step, 1.0, status) for step, status in ((15, "failed"), (16, "dropped"), (17, "withdrawn"))]
    assert early_stop(CONFIG, [*make_entries(30.0), *others, entry(20, 20.0)]) is None


@given(st.lists(st.floats(0, 100), max_size=12), st.lists(st.booleans(), min_size=12, max_size=12))
def test_decision_does_not_depend_on_the_order_of_results(values, are_done):
    entries = make_entries(*values)
    partly_done = [
        e if done else dataclasses.replace(e, status="waiting") for e, done in zip(entries, are_done, strict=False)
    ]
    assert early_stop(CONFIG, partly_done) in (None, early_stop(CONFIG, entries))


def test_unknown_metric_is_reported_with_the_available_ones():
    stopping = TrainingConfig(max_steps=1, early_stopping=CONFIG)
    both = dataclasses.replace(stopping, checkpoint=CheckpointConfig(best_metric="val/AP"))
    assert unknown_metrics(both, []) == []
    assert unknown_metrics(stopping, make_entries(1.0)) == []
    assert unknown_metrics(both, make_entries(1.0)) == [
        "training.checkpoint.best_metric is 'val/AP', which no evaluation computes; available: val/PQ"
    ]
    (message,) = unknown_metrics(stopping, [entry(1, 1.0, metric="val/mIoU")])
    assert message == "training.early_stopping.metric is 'val/PQ', which no evaluation computes; available: val/mIoU"


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("{}", "neither training.max_steps nor training.max_epochs is set"),
        ("{max_steps: 3, max_epochs: 2}", r"both training.max_steps \(3\) and training.max_epochs \(2\) are set"),
        ("{max_steps: 3, early_stopping: {metric: PQ}}", r"'PQ', but evaluation.sets has no such set; .* val/"),
        ("{max_steps: 3, checkpoint: {best_metric: PQ}}", r"best_metric is 'PQ', but .* has no such set; .* val/"),
        ("{max_steps: 3, early_stopping: {patience: 0, metric: val/PQ}}", "patience is 0; it must be at least 1"),
        ("{max_steps: 3, early_stopping: {metrc: val/PQ}}", "did you mean `metric`"),
    ],
)
def test_invalid_run_length_and_metrics_are_named(training, message):
    with pytest.raises(ConfigError, match=message):
        parse_recipe(f"{RECIPE}training: {training}\n").check_metrics()


def test_early_stopping_requires_evaluation_sets():
    recipe = f"{RECIPE}training: {{max_steps: 3, early_stopping: {{metric: val/PQ}}}}\nevaluation: {{sets: []}}\n"
    with pytest.raises(ConfigError, match="no such set, as it is empty"):
        parse_recipe(recipe).check_metrics()


def test_training_checks_its_metrics_before_it_starts():
    config = parse_recipe(f"{RECIPE}training: {{max_steps: 3, checkpoint: {{best_metric: vla/PQ}}}}\n")
    with pytest.raises(ConfigError, match=r"best_metric is 'vla/PQ'"):
        settled_run(config, AvailableDevices(), during_training=True)


def test_recipe_with_early_stopping_may_evaluate_other_sets():
    recipe = f"{RECIPE}training: {{max_steps: 3, early_stopping: {{metric: val/PQ}}}}\n"
    assert parse_recipe(recipe, ["evaluation.sets=[{dataset: train}]"]).evaluation.sets[0].dataset == "train"
