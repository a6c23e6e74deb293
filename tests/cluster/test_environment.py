"""Whether a Ray cluster is that of others, which may get more nodes."""

import pytest

from m2f.cluster.environment import OWN_CLUSTER, names_cluster


@pytest.mark.parametrize(
    ("address", "variables", "is_others"),
    [
        (None, {}, False),
        ("auto", {}, True),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, True),
        (None, {"RAY_ADDRESS": "127.0.0.1:6379", OWN_CLUSTER: "127.0.0.1:6379"}, False),
        ("10.0.0.1:6379", {"RAY_ADDRESS": "127.0.0.1:6379", OWN_CLUSTER: "127.0.0.1:6379"}, True),
    ],
)
def test_names_cluster_is_false_for_the_local_cluster_of_m2f(address, variables, is_others, monkeypatch):
    for name in ("RAY_ADDRESS", OWN_CLUSTER):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert names_cluster(address) == is_others
