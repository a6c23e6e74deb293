"""Create a KubeRay `RayJob` from a recipe and a template of the cluster, and validate it before it is applied."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

import m2f
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import dump_recipe
from m2f.cluster.submit.submit import run_digest
from m2f.cluster.train.resources import count_fitting, joint_shortages, resource_requests
from m2f.data_pipeline.documents import DocumentError, parse_json, parse_yaml
from m2f.model.errors import UserError

SCHEMA = m2f.HOME / "cluster" / "cloud" / "ray_job_schema.yaml"
_BY_DIGEST = re.compile(r"\S+@sha256:[0-9a-f]{64}")
RECIPE_FOLDER = "/etc/m2f"
APPLY_TIMEOUT_S = 60
"""Seconds for `kubectl apply`, which would wait for ever for a cluster that does not answer."""
MAX_NAME_LENGTH = 30
"""Number of characters of the run's name that are kept in the name of its RayJob. KubeRay allows 47 in total."""


class KubeRayError(UserError):
    """The template is not valid for the run, or kubectl is missing or refuses the RayJob."""


def ray_job_yaml(config: RunConfig, template: Path, env: Mapping[str, str]) -> str:
    """Return the YAML of a ConfigMap that holds the recipe, and of the RayJob that trains it.

    Args:
        config: recipe for the cluster, see `m2f.cluster.submit.submit.bind_to_cluster`.
        template: YAML file of one RayJob without a command.
        env: environment variables of the job, without secrets.

    Raises:
        KubeRayError: the template cannot be read, KubeRay would refuse it, or the run does not fit into its resources.
    """
    ray_job = _read_template(template)
    problems = schema_problems(ray_job)
    problems = problems or cluster_problems(config, ray_job["spec"]["rayClusterSpec"])
    if "submitterPodTemplate" in ray_job["spec"] and not problems:
        problems = _image_problems("submitterPodTemplate", ray_job["spec"]["submitterPodTemplate"]["spec"])
    if problems:
        raise KubeRayError(f"{template}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))
    name = _object_name(config)
    metadata = ray_job.setdefault("metadata", {}) | {"name": name}
    ray_job["metadata"] = metadata
    ray_job["spec"] |= {
        "entrypoint": f"m2f train {RECIPE_FOLDER}/recipe.yaml --restart",
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": dict(env)}, sort_keys=True),
    }
    head = ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    if ray_job["spec"].get("submissionMode", "K8sJobMode") == "K8sJobMode":  # other modes have no submitter pod
        ray_job["spec"].setdefault("submitterPodTemplate", {"spec": _submitter_pod(head)})
    _mount_recipe(head, name)
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {key: metadata[key] for key in ("name", "namespace") if key in metadata},
        "data": {"recipe.yaml": dump_recipe(config)},
    }
    return yaml.dump_all([config_map, ray_job], Dumper=_ReadableDumper, sort_keys=False, width=120)


class _ReadableDumper(yaml.SafeDumper):
    """YAML dumper that writes multi-line strings as block scalars."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_ReadableDumper.add_representer(str, _represent_text)


def kubectl_apply(text: str) -> None:
    """Apply objects with kubectl, which prints what it does. Raises KubeRayError if kubectl is missing or fails."""
    try:
        subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True, check=True, timeout=APPLY_TIMEOUT_S)
    except FileNotFoundError as error:
        raise KubeRayError(
            "kubectl is not installed; write the RayJob with --output, and apply it on another machine"
        ) from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise KubeRayError(f"kubectl apply failed: {error}") from error


def schema_problems(ray_job: object) -> list[str]:
    """Return a message, with the path, for every field that KubeRay or Kubernetes would refuse or silently drop."""
    validator = Draft202012Validator(yaml.safe_load(SCHEMA.read_text(encoding="utf-8")))
    errors = sorted(validator.iter_errors(ray_job), key=lambda error: error.json_path)
    return [f"{error.json_path.removeprefix('$.')}: {error.message[:200]}" for error in errors]


def cluster_problems(config: RunConfig, spec: Mapping[str, Any]) -> list[str]:
    """Return messages about settings that match the schema but would keep the run from starting or make it fragile."""
    problems: list[str] = []
    head, groups = spec["headGroupSpec"], spec["workerGroupSpecs"]
    if head["rayStartParams"].get("num-cpus") != "0":
        problems.append('headGroupSpec.rayStartParams.num-cpus must be "0", or workers would run beside the driver')
    problems += _image_problems("head", head["template"]["spec"])
    for group in groups:
        problems += _image_problems(group["groupName"], group["template"]["spec"])
        problems += _pod_problems(group["groupName"], group["template"]["spec"])
    nodes = [node for group in groups for node in [_pod_resources(group)] * group.get("maxReplicas", 0)]
    requests = resource_requests(config)
    for request in requests:
        if (capacity := count_fitting(nodes, request.needs)) < request.count:
            problems.append(f"{request}, but the groups have room for {capacity}; raise maxReplicas or the resources")
    problems += [f"{shortage}; raise maxReplicas or the resources" for shortage in joint_shortages(requests, nodes)]
    return problems


def _image_problems(group: str, pod: Mapping[str, Any]) -> list[str]:
    """Return messages about images without a digest. A tag can be moved to a different image; a digest cannot."""
    images = [container.get("image", "") for container in pod["containers"]]
    return [
        f"{group}: image is {image}; use the digest that `docker push` prints, such as registry/m2f@sha256:..."
        for image in images
        if not _BY_DIGEST.fullmatch(image) or "REGISTRY" in image
    ]


def _pod_problems(group: str, pod: Mapping[str, Any]) -> list[str]:
    problems: list[str] = []
    container = pod["containers"][0]
    if all(mount["mountPath"] != "/dev/shm" for mount in container.get("volumeMounts", ())):
        problems.append(f"{group}: nothing is mounted at /dev/shm, which has only 64 MiB by default")
    resources = container.get("resources", {})
    for name, amount in resources.get("limits", {}).items():
        if "/" in name and resources.get("requests", {}).get(name) != amount:
            problems.append(f"{group}: limits.{name} is {amount}; requests.{name} must be the same")
    return problems


def _pod_resources(group: Mapping[str, Any]) -> dict[str, float]:
    """Return the Ray resources of one pod of a group."""
    limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    cores = str(limits.get("cpu", "inf"))  # without a limit, all cores; str() because YAML parses 8 as a number
    gpus = sum(float(amount) for name, amount in limits.items() if name.endswith("/gpu"))
    cpus = float(cores.removesuffix("m")) / 1000 if cores.endswith("m") else float(cores)
    return {"CPU": cpus, "GPU": gpus, **_custom_resources(group)}


def _custom_resources(group: Mapping[str, Any]) -> dict[str, float]:
    """Return the custom Ray resources of one pod of a group.

    They are read from `resources`, or from `rayStartParams`, which contains them as shell-quoted JSON.
    """
    if "resources" in group:
        return {name: float(amount) for name, amount in group["resources"].items() if amount.isdecimal()}
    text = group["rayStartParams"].get("resources", "{}").strip("'")
    try:
        value = parse_json(text)
        value = parse_json(value) if isinstance(value, str) else value
        return {name: float(amount) for name, amount in value.items()}
    except (DocumentError, AttributeError, TypeError, ValueError) as error:
        raise KubeRayError(
            f"{group['groupName']}: rayStartParams.resources is not a JSON object of numbers: {text:.200} ({error})"
        ) from error


def _object_name(config: RunConfig) -> str:
    """Return the name of the objects: lower-case letters, digits and dashes only.

    It is short, because KubeRay appends suffixes to the names of objects that it creates.
    """
    short_name = re.sub(r"[^a-z0-9]+", "-", config.name.lower())[:MAX_NAME_LENGTH].strip("-")
    return f"m2f-{short_name}-{run_digest(config)}"


def _read_template(template: Path) -> dict[str, Any]:
    try:
        document = parse_yaml(template.read_bytes())
    except (OSError, DocumentError) as error:
        raise KubeRayError(
            f"{template}: cannot read the template, which must be one document of kind RayJob ({error})"
        ) from error
    if not isinstance(document, dict) or document.get("kind") != "RayJob":
        raise KubeRayError(
            f"{template}: a template must be one document of kind RayJob; see cluster/cloud/kuberay.yaml"
        )
    return document


def _mount_recipe(head: dict[str, Any], name: str) -> None:
    """Mount the recipe in the head pod, where the driver runs. Other pods do not need it."""
    head.setdefault("volumes", []).append({"name": "recipe", "configMap": {"name": name}})
    mount = {"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True}
    head["containers"][0].setdefault("volumeMounts", []).append(mount)


def _submitter_pod(head: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pod that runs `ray job submit` and follows the log.

    It has the image and the security context of the head, but no service account token. KubeRay's default pod has no
    security context and mounts such a token. KubeRay adds the command and Ray's token to either pod.
    """
    ray = head["containers"][0]
    shared_settings = {key: ray[key] for key in ("image", "imagePullPolicy", "securityContext") if key in ray}
    resources = {"requests": {"cpu": "500m", "memory": "200Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}}
    pod = {key: head[key] for key in ("securityContext", "imagePullSecrets") if key in head}
    return pod | {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "containers": [{"name": "ray-job-submitter", **shared_settings, "resources": resources}],
    }
