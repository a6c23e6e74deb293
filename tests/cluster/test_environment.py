"""Tests of the detection of external Ray clusters, to which nodes may be added."""

import pytest

from m2f.cluster.environment import OWN_CLUSTER_VARIABLE, is_external_cluster


@pytest.mark.parametrize(
    ("address", "variables", "is_external"),
    [
        (None, {}, False),
        ("auto", {}, True),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, True),
        (None, {"RAY_ADDRESS": "127.0.0.1:6379", OWN_CLUSTER_VARIABLE: "127.0.0.1:6379"}, False),
        ("10.0.0.1:6379", {"RAY_ADDRESS": "127.0.0.1:6379", OWN_CLUSTER_VARIABLE: "127.0.0.1:6379"}, True),
    ],
)
def test_is_external_cluster_is_false_for_the_local_cluster_of_m2f(address, variables, is_external, monkeypatch):
    for name in ("RAY_ADDRESS", OWN_CLUSTER_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_external_cluster(address) == is_external
