"""Tests of the tasks and parameters of a served model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

import m2f
from m2f.eval.config import MultiScale, SlidingWindows
from tests.cluster.predict.test_predict import PAINTED

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # raised when MLflow is imported, in the tests

PIXELS = np.zeros((64, 96, 3), np.uint8)


def with_test_time(trained, test_time):
    return replace(trained, evaluation=replace(trained.evaluation, test_time=test_time))


LARGE_IDS = replace(PAINTED, classes=tuple(replace(category, id=category.id + 65_530) for category in PAINTED.classes))
INSTANCE = replace(PAINTED, task="instance")


def serve(monkeypatch, trained, **params):
    """Return the keys of the response of a served model for one image."""
    from m2f.cluster.registry.served_model import ServedModel

    monkeypatch.setattr("m2f.cluster.registry.served_model.open_trained", lambda *_: trained)
    model = ServedModel()
    model.load_context(SimpleNamespace(model_config={}, artifacts={"checkpoint": "x"}))
    (response,) = model.predict(None, pd.DataFrame({"image": [PIXELS]}), params)
    return set(response) - {"height", "width"}


def signature(trained):
    """Return the keys of responses according to the signature that is registered with a model."""
    from m2f.cluster.registry.package import _signature

    return {column.name for column in _signature(trained).outputs} - {"height", "width"}


@pytest.mark.parametrize("test_time", [MultiScale(shortest_edges=(64,)), SlidingWindows(size=64, stride=64)])
def test_models_predict_the_tasks_that_their_test_time_settings_support(monkeypatch, test_time):
    trained = with_test_time(PAINTED, test_time)
    assert serve(monkeypatch, trained) == {"semantic"}
    assert signature(trained) == {"semantic"}
    with pytest.raises(MlflowException, match="task is 'panoptic'; this model supports semantic"):
        serve(monkeypatch, trained, task="panoptic")
    model = m2f.Model(trained)
    assert (model.task, model.tasks, model.predict(PIXELS).task) == ("panoptic", ("semantic",), "semantic")
    with pytest.raises(m2f.UserError, match=r"supports only the semantic task|windows do not overlap"):
        model.predict(PIXELS, task="panoptic")


def test_served_models_return_no_label_maps_with_ids_that_no_png_holds(monkeypatch):
    assert serve(monkeypatch, LARGE_IDS) == signature(LARGE_IDS) == {"panoptic", "instances"}
    assert "semantic" in m2f.Model(LARGE_IDS).tasks


def test_models_whose_test_time_settings_support_no_task_name_the_setting(monkeypatch):
    trained = with_test_time(INSTANCE, MultiScale(shortest_edges=(64,)))
    with pytest.raises(MlflowException, match=r"test_time\.kind=multi_scale"):
        serve(monkeypatch, trained)
    assert m2f.Model(trained).tasks == ()
    with pytest.raises(m2f.UserError, match=r"test_time\.kind=multi_scale"):
        m2f.Model(trained).predict(PIXELS)


def test_parameters_of_none_are_those_of_a_request_without_parameters(monkeypatch):
    from m2f.cluster.registry.served_model import ServedModel

    monkeypatch.setattr("m2f.cluster.registry.served_model.open_trained", lambda *_: PAINTED)
    model = ServedModel()
    model.load_context(SimpleNamespace(model_config={}, artifacts={"checkpoint": "x"}))
    images = pd.DataFrame({"image": [PIXELS]})
    none = {"task": None, "min_score": None, "thresholds": None}
    assert model.predict(None, images, none) == model.predict(None, images)
    model._class_thresholds = np.full(len(PAINTED.classes), np.inf)
    for params in (None, none):
        assert model.predict(None, images, params)[0]["instances"] == []
    assert model.predict(None, images, {"thresholds": False})[0]["instances"] != []


@pytest.mark.parametrize("min_score", [-0.1, 1.5, float("nan")])
def test_served_models_refuse_a_minimum_score_out_of_range(min_score):
    from m2f.cluster.registry.served_model import ServedModel

    model = ServedModel()
    model._supported, model._class_thresholds = ("instance",), None
    with pytest.raises(MlflowException, match=r"min_score is .*; it must be from 0 to 1"):
        model.predict(None, None, {"min_score": min_score})
