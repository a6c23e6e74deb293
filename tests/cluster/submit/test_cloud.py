"""Tests of the examples in `cluster/cloud` against the schemas of Ray, EC2 and KubeRay, and of spot notices."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from copy import deepcopy
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import drain_node

import m2f
from m2f.cluster.cli import main
from m2f.cluster.recipe.load import parse_recipe
from m2f.cluster.submit import google_secret, spot_notice
from m2f.cluster.submit.google_secret import read_secret
from m2f.cluster.submit.kuberay import KubeRayError, cluster_problems, ray_job_yaml, schema_problems
from m2f.cluster.submit.spot_notice import NOTICE_S, drain_on_notice, is_preempted
from tests.waiting import PATIENCE_S, wait_until

CLOUD = Path(m2f.__file__).parent / "cluster" / "cloud"
RAY_UP = sorted(CLOUD.glob("[ag]*.yaml"))
KUBERAY = CLOUD / "kuberay.yaml"
RECIPE = """
name: Cloud_run.1
output: s3://bucket/runs
datasets: {train: {shards: "s3://bucket/train"}, val: {shards: "s3://bucket/val"}}
data: {train: [{dataset: train}]}
training: {max_steps: 10}
evaluation: {sets: [{dataset: val}], resources_per_actor: {evaluator: 1}}
cluster: {num_workers: 16, resources_per_worker: {trainer: 1}}
tracking: {uri: "http://mlflow:5000"}
"""
DIGEST = "0123456789abcdef" * 4
GCP_INSTANCE = {"machineType", "disks", "scheduling", "serviceAccounts"}
"""Fields of Google's instance resource that the example uses."""


def read_yaml(path: Path):
    return yaml.safe_load(path.read_text())


# ray up


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_ray_up_accepts_the_examples(path):
    validate_config(prepare_config(read_yaml(path)))


def test_there_are_two_examples_for_ray_up():
    assert [path.stem for path in RAY_UP] == ["aws", "gcp"]


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_ray_up_validation_finds_a_misspelt_key(path):
    example = read_yaml(path)
    example["available_node_types"]["train"]["max_wrokers"] = 1
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(example))


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_the_head_offers_no_cpus_and_groups_offer_their_resources(path):
    example = read_yaml(path)
    types = example["available_node_types"]
    assert types[example["head_node_type"]]["resources"] == {"CPU": 0}
    assert types["train"]["resources"]["trainer"] == types["train"]["resources"]["GPU"]
    assert "evaluator" in types["evaluate"]["resources"]
    assert any("shm-size" in option for option in example["docker"]["run_options"])
    assert "--num-cpus=0" in example["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in example["head_start_ray_commands"][-1]
    assert f"python -m {spot_notice.__name__} {path.stem} " in example["worker_start_ray_commands"][-1]
    assert "/tmp" not in path.read_text(), "other users of a machine may write there"


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_every_node_writes_the_token_before_ray_starts(path):
    example = read_yaml(path)
    assert "--env RAY_AUTH_MODE=token" in example["docker"]["run_options"]
    assert "@sha256:" in example["docker"]["image"]
    for which in ("head", "worker"):
        stop, token, start = example[f"{which}_start_ray_commands"][:3]
        assert (stop, start.startswith("ray start")) == ("ray stop", True)
        pattern = r"umask 077 && mkdir -p ~/\.ray && python -.*m2f-ray-token.*> ~/\.ray/auth_token"
        assert re.fullmatch(pattern, token, re.DOTALL)


def test_token_file_is_readable_only_by_its_user(tmp_path):
    """The test runs the token command of the AWS example with a fake boto3."""
    shutil.copy(Path(__file__).with_name("fake_boto3.py"), tmp_path / "boto3.py")
    command = read_yaml(CLOUD / "aws.yaml")["head_start_ray_commands"][1]
    env = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    subprocess.run(["bash", "-c", command], env=env, check=True, timeout=PATIENCE_S)
    token_file = tmp_path / ".ray" / "auth_token"
    assert token_file.read_text() == "m2f-ray-token-value\n"
    assert (token_file.stat().st_mode & 0o777, token_file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.mark.parametrize("group", ["head", "train", "evaluate"])
def test_aws_example_uses_only_fields_known_to_ec2(group):
    """Ray does not validate `node_config`, so the test validates it with botocore's schema of RunInstances."""
    operation = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    node = read_yaml(CLOUD / "aws.yaml")["available_node_types"][group]["node_config"]
    report = ParamValidator().validate(node | {"MinCount": 1, "MaxCount": 1}, operation.input_shape)
    assert not report.has_errors(), report.generate_report()
    assert (node.get("InstanceMarketOptions") is not None) == (group == "train"), "only training is on spot machines"


@pytest.mark.parametrize("group", ["head", "train", "evaluate"])
def test_the_gcp_example_has_valid_machines(group):
    node = read_yaml(CLOUD / "gcp.yaml")["available_node_types"][group]["node_config"]
    assert set(node) <= GCP_INSTANCE
    assert (node.get("scheduling", {}).get("provisioningModel") == "SPOT") == (group == "train")
    assert sum(disk["boot"] for disk in node["disks"]) == 1


@pytest.mark.parametrize("path", sorted(CLOUD.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_contain_no_secrets(path):
    text = path.read_text().lower()
    assert not any(word in text for word in ("aws_secret", "access_key", "password:", "auth_token="))


# KubeRay


@pytest.fixture
def template(tmp_path):
    """Write the KubeRay example with a valid image reference, and return its path."""
    path = tmp_path / "kuberay.yaml"
    path.write_text(KUBERAY.read_text().replace("REGISTRY", "registry.example.com").replace("DIGEST", DIGEST))
    return path


def ray_job_documents(template: Path, *overrides):
    return list(yaml.safe_load_all(ray_job_yaml(parse_recipe(RECIPE, overrides), template, {"NCCL_DEBUG": "WARN"})))


def with_image(document):
    return yaml.safe_load(
        yaml.safe_dump(document).replace("REGISTRY", "registry.example.com").replace("DIGEST", DIGEST)
    )


def test_the_ray_job_runs_the_recipe_from_a_config_map(template):
    config_map, ray_job = ray_job_documents(template)
    name = ray_job["metadata"]["name"]
    assert name.startswith("m2f-cloud-run-1-")
    assert config_map["metadata"] == {"name": name, "namespace": "default"}
    assert parse_recipe(config_map["data"]["recipe.yaml"]) == parse_recipe(RECIPE)
    spec = ray_job["spec"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = [mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "recipe"]
    assert spec["entrypoint"] == f"m2f train {mount['mountPath']}/recipe.yaml --restart"
    assert {"name": "recipe", "configMap": {"name": name}} in head["volumes"]
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"NCCL_DEBUG": "WARN"}}


def test_long_name_is_truncated_to_the_kuberay_limit(template):
    name = ray_job_documents(template, f"name=a{'_Long.' * 20}")[1]["metadata"]["name"]
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 47


def test_written_ray_job_matches_the_kuberay_schema(template):
    assert schema_problems(ray_job_documents(template)[1]) == []


def test_kuberay_example_pods_have_minimal_privileges():
    spec = read_yaml(KUBERAY)["spec"]["rayClusterSpec"]
    assert spec["authOptions"]["mode"] == "token"
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        context = pod["securityContext"]
        assert (context["runAsNonRoot"], context["runAsUser"] > 0) == (True, True)
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    assert spec["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"] is False
    mounted = [group["template"]["spec"].get("automountServiceAccountToken", True) for group in groups]
    assert mounted == [True, False, False], "the autoscaler on the head asks Kubernetes for pods"


def test_submitter_pod_has_image_and_rights_of_the_head_but_no_kubernetes_token(template):
    spec = ray_job_documents(template)[1]["spec"]
    head, pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"], spec["submitterPodTemplate"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == head["containers"][0]["image"] == f"registry.example.com/m2f@sha256:{DIGEST}"
    assert container["securityContext"] == head["containers"][0]["securityContext"]
    assert pod["securityContext"] == head["securityContext"]
    assert pod["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in pod
    assert pod["restartPolicy"] == "Never", "pods of a Kubernetes Job have no other choice but OnFailure"
    assert "command" not in container, "KubeRay adds it"
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}, "KubeRay gives Ray's token to it"


def test_submitter_of_the_template_is_kept_and_needs_an_image_digest(template):
    document = read_yaml(template)
    own = {"spec": {"restartPolicy": "Never", "containers": [{"name": "mine", "image": f"r/m2f@sha256:{DIGEST}"}]}}
    document["spec"]["submitterPodTemplate"] = own
    template.write_text(yaml.safe_dump(document))
    assert ray_job_documents(template)[1]["spec"]["submitterPodTemplate"] == own
    own["spec"]["containers"][0]["image"] = "r/m2f:latest"
    template.write_text(yaml.safe_dump(document))
    with pytest.raises(KubeRayError, match="submitterPodTemplate: image is r/m2f:latest; use the digest"):
        ray_job_documents(template)


def test_other_submission_modes_get_no_submitter_pod(template):
    template.write_text(template.read_text().replace("K8sJobMode", "HTTPMode"))
    assert "submitterPodTemplate" not in ray_job_documents(template)[1]["spec"]


def test_the_kuberay_example_drains_before_pods_end():
    groups = {group["groupName"]: group for group in read_yaml(KUBERAY)["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    pod = groups["train"]["template"]["spec"]
    (_, _, script) = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    seconds = int(script.rpartition("sleep ")[2])
    assert "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION" in script
    assert f"--deadline-remaining-seconds {seconds}" in script
    assert seconds < pod["terminationGracePeriodSeconds"]
    assert "nodeSelector" not in groups["evaluate"]["template"]["spec"], "evaluation is on demand"


def set_value(tree, path: str, value):
    *parents, last = (int(key) if key.isdecimal() else key for key in path.split("."))
    for key in parents:
        tree = tree[key]
    if value is None:
        del tree[last]
    else:
        tree[last] = value


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", "4", "workerGroupSpecs[0].maxReplicas"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.groupName", None, "'groupName' is a required property"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "0 is not of type 'string'"),
        ("spec.ttlSecondsAfterFinish", 3, "'ttlSecondsAfterFinish' was unexpected"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.imge", "x", "'imge' was unexpected"),
        ("spec.submissionMode", "Http", "submissionMode"),
        ("apiVersion", "ray.io/v1alpha1", "'ray.io/v1' was expected"),
    ],
)
def test_fields_that_kubernetes_rejects_or_drops_are_reported(path, value, expected):
    document = read_yaml(KUBERAY)
    set_value(document, path, value)
    (problem,) = schema_problems(document)
    assert expected in problem


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("headGroupSpec.rayStartParams.num-cpus", "4", "beside the driver"),
        ("workerGroupSpecs.1.template.spec.containers.0.volumeMounts", [], "evaluate: nothing is mounted at /dev/shm"),
        (
            "workerGroupSpecs.0.template.spec.containers.0.resources.requests",
            {"cpu": "4"},
            "train: limits.nvidia.com/gpu is 4; requests.nvidia.com/gpu must be the same",
        ),
        (
            "headGroupSpec.template.spec.containers.0.image",
            "REGISTRY/m2f@sha256:DIGEST",
            "head: image is REGISTRY/m2f@",
        ),
        ("headGroupSpec.template.spec.containers.0.image", "r.example.com/m2f:0.1.0", "use the digest"),
        ("workerGroupSpecs.0.template.spec.containers.0.image", "m2f@sha256:0123", "train: image is m2f@sha256:0123"),
        (
            "workerGroupSpecs.0.maxReplicas",
            3,
            "training: 16 processes with 1 CPU, 1 trainer each, but the groups have room for 12",
        ),
        ("workerGroupSpecs.1.rayStartParams", {}, "evaluation: 1 process with 1 CPU, 1 evaluator each, but the gro"),
    ],
)
def test_clusters_that_cannot_start_the_run_are_reported(path, value, expected):
    spec = with_image(read_yaml(KUBERAY))["spec"]["rayClusterSpec"]
    assert cluster_problems(parse_recipe(RECIPE), deepcopy(spec)) == []
    set_value(spec, path, value)
    (problem,) = cluster_problems(parse_recipe(RECIPE), spec)
    assert expected in problem


@pytest.mark.parametrize(
    ("workers", "fits"),
    [
        ("num_gpus_per_worker: 1, num_cpus_per_worker: 11, num_workers: 16", True),
        ("num_gpus_per_worker: 1, num_cpus_per_worker: 12, num_workers: 16", False),  # a node holds three
        ("num_gpus_per_worker: 1, num_workers: 19", False),
        ("num_gpus_per_worker: 1, num_workers: [2, 64]", True),
    ],
)
def test_pod_resources_must_fit_the_run(workers, fits):
    spec = with_image(read_yaml(KUBERAY))["spec"]["rayClusterSpec"]
    config = parse_recipe(RECIPE.replace("num_workers: 16", workers))
    assert (cluster_problems(config, spec) == []) == fits


@pytest.mark.parametrize(("cpu", "fits"), [("900m", False), ("6000m", True), (6, True), ("6", True), ("0.5", False)])
def test_cpu_quantities_are_parsed(cpu, fits):
    spec = with_image(read_yaml(KUBERAY))["spec"]["rayClusterSpec"]
    limits = spec["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["resources"]["limits"]
    limits["cpu"] = cpu
    problems = cluster_problems(parse_recipe(RECIPE), spec)
    assert [problem.startswith("evaluation: 1 process with 1 CPU") for problem in problems] == [True] * (not fits)


def test_group_without_a_cpu_limit_has_room_for_all_workers():
    spec = with_image(read_yaml(KUBERAY))["spec"]["rayClusterSpec"]
    for group in spec["workerGroupSpecs"]:
        del group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    assert cluster_problems(parse_recipe(RECIPE), spec) == []


def test_training_and_evaluation_must_fit_together():
    spec = with_image(read_yaml(KUBERAY))["spec"]["rayClusterSpec"]  # at most 18 GPUs
    gpus = ["evaluation.num_gpus_per_actor=1", "cluster.num_gpus_per_worker=1", "cluster.resources_per_worker={}"]
    assert cluster_problems(parse_recipe(RECIPE, [*gpus, "cluster.num_workers=17"]), spec) == []
    (problem,) = cluster_problems(parse_recipe(RECIPE, [*gpus, "cluster.num_workers=18"]), spec)
    assert problem.startswith("training and evaluation together need 19 GPU, but the nodes have 18; raise maxReplicas")


def test_resources_of_a_group_are_read_from_their_own_field():
    spec = with_image(read_yaml(KUBERAY))["spec"]["rayClusterSpec"]
    spec["workerGroupSpecs"][0] |= {"resources": {"trainer": "4"}, "rayStartParams": {}}
    assert cluster_problems(parse_recipe(RECIPE), spec) == []


@pytest.mark.parametrize("text", ["{trainer: 4}", "[4]", '{"trainer": "many"}', "[" * 200_000, '"4"'])
def test_ray_start_resources_that_are_not_json_are_refused(tmp_path, text):
    document = with_image(read_yaml(KUBERAY))
    set_value(document, "spec.rayClusterSpec.workerGroupSpecs.0.rayStartParams.resources", text)
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(KubeRayError, match=r"train: rayStartParams\.resources is not a JSON object"):
        ray_job_documents(tmp_path / "t.yaml")


@pytest.mark.parametrize(
    "text", ["a: [", "kind: RayCluster", "kind: RayJob\n---\nkind: RayJob", "[" * 5000, "kind: RayJob\nkind: RayJob"]
)
def test_templates_that_are_not_one_ray_job_are_refused(tmp_path, text):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(KubeRayError, match="template"):
        ray_job_documents(tmp_path / "t.yaml")


def test_options_of_kuberay_without_a_template_are_refused(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert main(["submit", str(tmp_path / "r.yaml"), "--kuberay"]) == 2
    assert "copy cluster/cloud/kuberay.yaml" in capsys.readouterr().err
    assert main(["submit", str(tmp_path / "r.yaml"), "--output", "job.yaml"]) == 2
    assert "--output and --apply require --kuberay" in capsys.readouterr().err


def test_submit_writes_the_ray_job_to_a_file(tmp_path, template, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE)
    words = ["submit", str(tmp_path / "r.yaml"), "cluster.num_workers=4", "--kuberay", str(template)]
    assert main([*words, "--output", str(tmp_path / "job.yaml")]) == 0
    config_map, ray_job = yaml.safe_load_all((tmp_path / "job.yaml").read_text())
    assert (config_map["kind"], ray_job["kind"]) == ("ConfigMap", "RayJob")
    assert "num_workers: 4" in config_map["data"]["recipe.yaml"]
    assert main([*words, "output=/only/here"]) == 2
    assert "output is /only/here" in capsys.readouterr().err


def test_apply_passes_the_ray_job_to_kubectl(tmp_path, template, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE)
    words = ["submit", str(tmp_path / "r.yaml"), "--kuberay", str(template), "--apply"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(words) == 2
    assert "kubectl is not installed" in capsys.readouterr().err
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\nexec /bin/cat > {tmp_path}/text\n')
    kubectl.chmod(0o755)
    assert main(words) == 0
    assert (tmp_path / "words").read_text() == "apply -f -\n"
    assert [document["kind"] for document in yaml.safe_load_all((tmp_path / "text").read_text())] == [
        "ConfigMap",
        "RayJob",
    ]
    kubectl.write_text("#!/bin/sh\nexit 1\n")
    assert main(words) == 2
    assert "kubectl apply failed" in capsys.readouterr().err


# Spot notices


@pytest.fixture
def metadata_server():
    """Yield the URL of a metadata server for both clouds, an event, and the paths of its answered requests.

    Set the event to announce a preemption.
    """
    notice, answered = threading.Event(), []

    class Server(BaseHTTPRequestHandler):
        def respond(self, status: int, text: str = ""):
            self.send_response_only(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_PUT(self):
            self.respond(200, "token" if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else "")

        def do_GET(self):
            if self.path == "/latest/meta-data/spot/instance-action":
                if self.headers["X-aws-ec2-metadata-token"] != "token":
                    self.respond(401)
                elif notice.is_set():
                    self.respond(200, json.dumps({"action": "terminate", "time": "2030-01-01T00:00:00Z"}))
                else:
                    self.respond(404)
            elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
                self.respond(200, "TRUE" if notice.is_set() else "FALSE")
            elif self.path == "/computeMetadata/v1/instance/service-accounts/default/token":
                self.respond(200 if self.headers["Metadata-Flavor"] else 403, json.dumps({"access_token": "pass"}))
            elif self.path == "/v1/projects/p/secrets/s/versions/latest:access":
                payload = {"payload": {"data": base64.b64encode(b"hush\n").decode()}}
                self.respond(200 if self.headers["Authorization"] == "Bearer pass" else 401, json.dumps(payload))
            else:
                self.respond(403)

            answered.append(self.path)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", notice, answered
        server.shutdown()


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_spot_notice_drains_the_node(metadata_server, cloud):
    address, notice, answered = metadata_server
    assert not is_preempted(cloud, address)
    answered.clear()
    drained: list[int] = []
    watcher = threading.Thread(target=lambda: drain_on_notice(cloud, drained.append, address, poll_s=0.02))
    watcher.start()
    wait_until(lambda: len(answered) > 3, "several polls")
    assert watcher.is_alive()
    assert drained == []
    notice.set()
    watcher.join(PATIENCE_S)
    assert drained == [NOTICE_S[cloud]]


def test_google_secret_is_read_with_the_service_account_of_the_machine(metadata_server):
    address, *_ = metadata_server
    assert read_secret("p", "s", address, address) == "hush"
    with pytest.raises(OSError, match="403"):
        read_secret("p", "other", address, address)


def test_unreachable_metadata_server_is_not_a_notice(caplog):
    assert not is_preempted("aws", "http://127.0.0.1:9")
    assert "127.0.0.1:9" in caplog.text


def test_truncated_answer_of_the_metadata_server_is_not_a_notice(monkeypatch, caplog):
    def truncated(*arguments, **options):
        raise IncompleteRead(b"")

    monkeypatch.setattr(spot_notice, "urlopen", truncated)
    assert not is_preempted("gcp", "http://metadata")
    assert "IncompleteRead" in caplog.text


def test_google_secret_with_an_unexpected_response_ends_with_a_message(monkeypatch, capsys):
    monkeypatch.setattr(google_secret, "_request_json", lambda url, headers: {})
    assert google_secret.main(["p", "s"]) == 1
    assert "the secret s of p cannot be read (KeyError: 'access_token')" in capsys.readouterr().err


def test_ray_has_the_drain_node_command():
    """Ray's help does not list the command, so a new version may remove it."""
    options = {option for parameter in drain_node.params for option in parameter.opts}
    assert {"--reason", "--reason-message", "--deadline-remaining-seconds"} <= options
