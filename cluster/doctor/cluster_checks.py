"""Checks of a Ray cluster for `m2f doctor`: one task on every node, and comparisons between nodes."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from m2f.cluster.doctor.doctor import machine_checks, run_checks
from m2f.cluster.doctor.finding import Finding
from m2f.cluster.doctor.services import skew_finding
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.train.resources import count_fitting, joint_shortages, resource_requests

NODE_TIMEOUT_S = 180.0
"""Seconds for all checks of a node: starting a process, importing torch, and the sum of its GPUs (REDUCE_TIMEOUT_S)."""
CLUSTER = "cluster"


@dataclass(frozen=True)
class NodeReport:
    """Findings of one node, and the versions to compare between nodes."""

    findings: list[Finding]
    versions: tuple[str, str]
    """Versions of Python and Ray."""


def check_cluster(config: RunConfig | None) -> list[Finding]:
    """Check the connected cluster and all its nodes, and return the findings."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    check = ray.remote(num_cpus=0, max_retries=0)(check_node)
    calls: dict[Any, Mapping[str, Any]] = {}
    for node in nodes:
        on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        gpus = int(node["Resources"].get("GPU", 0))
        calls[check.options(scheduling_strategy=on_node).remote(config, gpus, _address(node))] = node
    findings: list[Finding] = []
    versions: dict[tuple[str, str], list[str]] = {}
    done, unfinished = ray.wait(list(calls), num_returns=len(calls), timeout=NODE_TIMEOUT_S)
    for call in done:
        name = _address(calls[call])
        try:
            report = ray.get(call)
        except ray.exceptions.RayError as error:
            detail = str(error).strip().splitlines()[-1][:200]
            findings.append(Finding("node", "failed", detail, "see its logs in the dashboard", name))
            continue
        findings += report.findings
        versions.setdefault(report.versions, []).append(name)
    for call in unfinished:
        detail = f"no response in {NODE_TIMEOUT_S:.0f} s"
        remedy = "the node is overloaded or unreachable; see the dashboard"
        findings.append(Finding("node", "failed", detail, remedy, _address(calls[call])))
    findings.sort(key=lambda finding: finding.where)
    return [*findings, *_check_versions(versions), *_check_clocks(nodes), *_check_capacity(config, nodes)]


def check_node(config: RunConfig | None, gpus: int, name: str) -> NodeReport:
    """Check the node that runs this Ray task. `gpus` is the number of GPUs that Ray counts on the node `name`."""
    findings = run_checks(machine_checks(config, gpus), where=name)
    return NodeReport(findings, (platform.python_version(), ray.__version__))


def read_clock() -> float:
    """Return the time of the node that runs this Ray task, as Unix time in seconds."""
    return time.time()


def _check_clocks(nodes: list[dict[str, Any]]) -> list[Finding]:
    """Compare the clocks of the nodes with that of this machine.

    Only the second call on each node counts, since the first one includes the start of a process.
    """
    findings: list[Finding] = []
    is_measured = False
    clock = ray.remote(num_cpus=0)(read_clock)
    for node in nodes:
        on_node = clock.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        try:
            ray.get(on_node.remote(), timeout=NODE_TIMEOUT_S)
            before = time.time()
            node_time = ray.get(on_node.remote(), timeout=NODE_TIMEOUT_S)
        except ray.exceptions.RayError:
            continue  # `check_node` also fails on such a node, and its failure is reported
        is_measured = True
        skew = node_time - (before + time.time()) / 2
        finding = skew_finding(skew, "the driver")
        if finding.state != "ok":
            findings.append(replace(finding, where=_address(node)))
    if findings or not is_measured:
        return findings
    return [Finding("clocks", "ok", "the clocks of all nodes agree", where=CLUSTER)]


def _check_versions(versions: Mapping[tuple[str, str], list[str]]) -> list[Finding]:
    """Compare the versions of the nodes that answered. Returns no finding if none did."""
    if len(versions) > 1:
        detail = "; ".join(
            f"Python {python}, Ray {version}: {', '.join(names)}" for (python, version), names in versions.items()
        )
        return [Finding("same versions", "failed", detail, "start all nodes from one image", CLUSTER)]
    if not versions:
        return []
    return [Finding("same versions", "ok", "all nodes have the same Python and Ray", where=CLUSTER)]


def _check_capacity(config: RunConfig | None, nodes: list[dict[str, Any]]) -> list[Finding]:
    """Return findings on whether the run fits into the cluster at its current size."""
    if config is None:
        return []
    findings: list[Finding] = []
    remedy = "request fewer resources in the recipe, or add nodes"
    requests, resources = resource_requests(config), [node["Resources"] for node in nodes]
    for request in requests:
        capacity = count_fitting(resources, request.needs)
        detail = f"{request}; the cluster has room for {capacity}"
        if capacity < request.count:
            findings.append(Finding("resources", "warning", detail, remedy, CLUSTER))
        else:
            findings.append(Finding("resources", "ok", detail, where=CLUSTER))
    shortages = joint_shortages(requests, resources)
    return findings + [Finding("resources", "warning", shortage, remedy, CLUSTER) for shortage in shortages]


def _address(node: Mapping[str, Any]) -> str:
    return node["NodeManagerAddress"]
