import re
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import m2f
from m2f.cluster import ray_private

CLUSTER = m2f.HOME / "cluster"


def test_installed_ray_version_is_tested():
    assert SpecifierSet(ray_private.TESTED_VERSIONS).contains(metadata.version("ray"))


def test_requirements_allow_the_lowest_tested_ray_version():
    needed = [Requirement(text) for text in metadata.requires("m2f")]
    lowest = min(Version(part.version) for part in SpecifierSet(ray_private.TESTED_VERSIONS))
    specifiers = [requirement.specifier for requirement in needed if requirement.name == "ray"]
    assert specifiers
    assert all(specifier.contains(lowest) for specifier in specifiers)


def test_only_ray_private_imports_private_modules_of_ray():
    private = re.compile(r"^\s*(?:from|import) ray\.(?:\S*\._|_|train\.v2|dashboard|core|includes)", re.MULTILINE)
    found = [path for path in CLUSTER.rglob("*.py") if private.search(path.read_text(encoding="utf-8"))]
    assert [path.name for path in found] == ["ray_private.py"]


def test_ray_train_does_not_retry_an_attempt():
    config = ray_private.attempt_config("attempt-1", "/somewhere")
    assert config.failure_config is not None
    assert (config.failure_config.max_failures, config.failure_config.max_preemption_failures) == (0, 0)
    assert config.failure_config.controller_failure_limit == 0
    assert ray_private.scaling_config(3, False, {"CPU": 2}).num_workers == 3


def test_noisy_loggers_of_ray_exist():
    ray_private.quiet_reports()
    ray_private.quiet_tokens()
    ray_private.quiet_job_client()


def test_missing_private_ray_module_is_reported_with_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray._private.state", None)
    with pytest.raises(ray_private.RayVersionError, match=r"Ray 2\.\S+ lacks .*pip install 'ray\[default,train\]>=2"):
        ray_private.free_resources()
