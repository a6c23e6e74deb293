"""Tests of `m2f submit`: uploads, recipes, environments and job ids, and a Ray cluster with token authentication."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from m2f.cluster.cli import main
from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.recipe.load import load_recipe, parse_recipe
from m2f.cluster.submit.environment import ALLOWED_NAMES, ALLOWED_PREFIXES, job_environment
from m2f.cluster.submit.ray_jobs import DASHBOARD_TIMEOUT_S, JobClient, JobError, JobInfo
from m2f.cluster.submit.submit import ChosenJob, bind_to_cluster, choose_job, job_name, jobs_of_run
from m2f.cluster.submit.upload import LIMIT_BYTES, UploadError, pack
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import OutageError
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.errors import ConfigError
from m2f.trainer.checkpoint.folder import list_checkpoints
from tests.waiting import PATIENCE_S, wait_until

RECIPE = """
name: sent
output: s3://bucket/runs
datasets: {train: {shards: "s3://bucket/train"}, unused: {shards: /only/here}}
data: {train: [{dataset: train}]}
training: {max_steps: 10}
tracking: {uri: "http://mlflow:5000"}
"""
TOKEN = "0123456789abcdef" * 4
REPOSITORY = Path(__file__).parents[3]


def recipe_config(*overrides):
    return parse_recipe(RECIPE, overrides)


def job_info(job_id, status="RUNNING", digest="same"):
    return JobInfo(job_id, status, "", None, 1.0, {"m2f_recipe": digest})


# Upload


def write_code(folder: Path, extra: int = 0) -> Path:
    for package in ("model", "eval"):
        package = f"m2f/{package}"
        (folder / package / "__pycache__").mkdir(parents=True)
        (folder / package / "__init__.py").write_text("")
        (folder / package / "__pycache__" / "old.pyc").write_text("x")
    (folder / "m2f" / "model" / "zoo").mkdir()
    (folder / "m2f" / "model" / "zoo" / "weights.bin").write_bytes(os.urandom(extra))
    (folder / "pyproject.toml").write_text("[project]")
    return folder


def members(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as content:
        return {name for name in content.namelist() if not name.endswith("/")}


def test_archive_contains_code_and_recipe_without_caches(tmp_path):
    code = write_code(tmp_path / "code")
    (tmp_path / "out").mkdir()
    archive = pack(tmp_path / "out", "name: x\n", source=code)
    expected = {"m2f/model/__init__.py", "m2f/eval/__init__.py"}
    assert members(archive) == expected | {"recipe.yaml", "pyproject.toml", "m2f/model/zoo/weights.bin"}


def test_equal_content_gives_an_equal_archive(tmp_path):
    code = write_code(tmp_path / "code")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first, second = (pack(tmp_path / name, "name: x\n", source=code).read_bytes() for name in ("one", "two"))
    assert first == second


def test_archive_contains_only_the_recipe_if_m2f_is_installed(tmp_path):
    assert members(pack(tmp_path, "name: x\n", code=False)) == {"recipe.yaml"}


def test_a_too_large_archive_is_refused_and_rayignore_is_respected(tmp_path):
    code = write_code(tmp_path / "code", extra=LIMIT_BYTES + 1)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with pytest.raises(UploadError, match=r"is 100\.. MiB.*m2f/model/zoo \(100\.. MiB\).*\.rayignore"):
        pack(tmp_path / "one", None, source=code)
    (code / ".rayignore").write_text("m2f/model/zoo\n")
    assert "m2f/model/zoo/weights.bin" not in members(pack(tmp_path / "two", None, source=code))


def test_the_archive_of_this_checkout_is_below_4_mib(tmp_path):
    assert pack(tmp_path, None).stat().st_size < 4 * 2**20


# Recipe


def test_the_recipe_of_a_job_has_no_cluster_address():
    config = recipe_config("cluster.address=10.0.0.1:6379")
    assert bind_to_cluster(config).cluster.address is None


@pytest.mark.parametrize(
    "override",
    ["output=/runs", "datasets.train.shards=/data/train", "model.weights=/w.pkl", "tracking.uri=sqlite:///m.db"],
)
def test_local_paths_are_refused_with_their_setting(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        bind_to_cluster(recipe_config(override))


def test_metric_without_evaluation_set_is_refused_before_submission():
    with pytest.raises(ConfigError, match=r"best_metric is 'PQ', but evaluation\.sets has no such set"):
        bind_to_cluster(recipe_config("training.checkpoint.best_metric=PQ"))


def test_paths_in_shared_folders_are_accepted():
    config = recipe_config("output=/mnt/fsx/runs")
    assert bind_to_cluster(config, ["/mnt/fsx"]).output == "/mnt/fsx/runs"
    with pytest.raises(ConfigError, match="output"):
        bind_to_cluster(config, ["/mnt/fs"])


def test_loopback_address_prints_a_warning(capsys):
    bind_to_cluster(recipe_config("tracking.uri=http://localhost:5000"))
    assert "on every node, this address refers to the node itself" in capsys.readouterr().err


# Environment


def test_a_job_gets_given_variables_and_the_tracking_server(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("M2F_DATA", "/data")
    env = job_environment(["M2F_DATA", "NCCL_DEBUG=INFO"], recipe_config("tracking.uri=null"))
    assert env["M2F_DATA"] == "/data"
    assert env["NCCL_DEBUG"] == "INFO"
    assert env["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert int(env["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_a_local_tracking_store_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////home/me/mlflow.db")
    assert "MLFLOW_TRACKING_URI" not in job_environment([], recipe_config("tracking.uri=null"))


SECRETS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "BASIC_AUTH", "DATABASE_URL", "DB_PASS"),
    *("GITHUB_PAT", "GOOGLE_APPLICATION_CREDENTIALS", "HF_TOKEN", "HTTPS_PROXY", "HUGGING_FACE_HUB_TOKEN", "M2F_PASS"),
    *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MYSQL_PWD", "MY_OWN", "NETRC"),
    *("OMP", "PGPASSFILE", "PGPASSWORD", "RAY_AUTH_TOKEN", "SENTRY_DSN", "SLACK_WEBHOOK", "WANDB_API_KEY", "nccl_x"),
)


@pytest.mark.parametrize("name", SECRETS)
def test_variables_not_on_the_allowlist_are_rejected(name, monkeypatch):
    monkeypatch.setenv(name, "hush")
    for word in (name, f"{name}=hush"):
        with pytest.raises(
            ConfigError, match=f"--env {name}: the variable may contain a secret.*where the nodes"
        ) as caught:
            job_environment([word])
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "M2F_DATA", "NCCL_X"])
@pytest.mark.parametrize("value", ["https://hush@host", "https://me:hu/sh@host", "https://h?token=hush", "me:hush@h"])
def test_urls_with_secrets_are_rejected_in_every_variable(name, value):
    with pytest.raises(ConfigError, match=f"the variable {name} has ") as caught:
        job_environment([f"{name}={value}"])
    assert "sh@" not in str(caught.value)
    assert "hush" not in str(caught.value)


def test_tracking_uri_with_a_secret_is_not_passed_to_the_job(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://hush@host")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_TOKEN"):
        job_environment([], recipe_config("tracking.uri=null"))


def test_every_allowed_variable_is_documented():
    text = (REPOSITORY / "docs" / "cloud.md").read_text()
    documented = text.partition("`--env` takes")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+?)\*?`", documented)) == ALLOWED_NAMES | set(ALLOWED_PREFIXES)


def test_an_unset_variable_is_refused(monkeypatch):
    monkeypatch.delenv("NCCL_NOWHERE", raising=False)
    with pytest.raises(ConfigError, match="not set on this machine"):
        job_environment(["NCCL_NOWHERE"])


# Choice of the job


def test_the_first_job_of_a_run_has_number_1():
    config = recipe_config()
    assert choose_job(config, "same", [job_info("other-1"), job_info(job_name(config) + "-x")]) == ChosenJob(
        f"{job_name(config)}-1", is_new=True
    )


def test_active_job_is_reused():
    base = job_name(recipe_config())
    jobs = [job_info(f"{base}-1", "FAILED"), job_info(f"{base}-2", "PENDING")]
    assert choose_job(recipe_config(), "same", jobs) == ChosenJob(f"{base}-2", is_new=False)


def test_new_job_gets_the_next_number_after_ended_jobs():
    base = job_name(recipe_config())
    jobs = [job_info(f"{base}-10", "STOPPED"), job_info(f"{base}-9", "SUCCEEDED")]
    assert choose_job(recipe_config(), "same", jobs) == ChosenJob(f"{base}-11", is_new=True)
    assert [job.job_id for job in jobs_of_run(recipe_config(), jobs)] == [f"{base}-9", f"{base}-10"]


def test_an_active_job_with_another_recipe_is_refused():
    base = job_name(recipe_config())
    with pytest.raises(ConfigError, match=f"m2f submit --stop {base}-1"):
        choose_job(recipe_config(), "other", [job_info(f"{base}-1")])


@pytest.mark.parametrize(
    ("state", "code", "error", "status"),
    [
        ("SUCCEEDED", 0, "", 0),
        ("FAILED", 2, "JOB_ENTRYPOINT_COMMAND_ERROR", 2),
        ("FAILED", 69, "JOB_ENTRYPOINT_COMMAND_ERROR", 69),
        ("FAILED", -9, "JOB_ENTRYPOINT_COMMAND_ERROR", 128 + 9),
        ("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED", 69),
        ("FAILED", None, "RUNTIME_ENV_SETUP_FAILURE", 1),
        ("FAILED", None, "JOB_SUPERVISOR_ACTOR_START_TIMEOUT", 1),
        ("FAILED", None, "", 1),
        ("STOPPED", None, "", 3),
    ],
)
def test_job_exit_status_shows_whether_a_restart_helps(state, code, error, status):
    assert JobInfo("job", state, "", code, 1.0, {}, error).exit_status == status


def test_status_takes_a_recipe_by_name_or_the_id_of_a_job(monkeypatch, capsys):
    job = job_info(f"{job_name(load_recipe('camvid_panoptic'))}-1")

    class Client:
        address = "http://head:8265"

        def __init__(self, address):
            pass

        def jobs(self):
            return [job_info("other-1"), job]

    monkeypatch.setattr("m2f.cluster.submit.ray_jobs.JobClient", Client)
    for word in ("camvid_panoptic", job.job_id):
        assert main(["submit", "--status", word]) == 0
        assert capsys.readouterr().out.startswith(job.job_id)
    assert main(["submit", "--status", "other-2"]) == 2
    assert "http://head:8265 has no job other-2, and it is not a recipe: no recipe is named" in capsys.readouterr().err


def test_job_names_differ_between_run_folders():
    assert job_name(recipe_config()) != job_name(recipe_config("output=s3://other/runs"))


# Connection


def test_a_missing_or_wrong_address_is_refused(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(JobError, match="no cluster given"):
        JobClient(None)
    with pytest.raises(JobError, match="http://HEAD:8265"):
        JobClient("10.0.0.1:6379")


def test_a_dashboard_that_does_not_answer_for_long_is_an_outage(monkeypatch):
    def refuse(self, job_id):
        raise JobError("no answer from http://head:8265")

    client = JobClient.__new__(JobClient)
    monkeypatch.setattr(JobClient, "job", refuse)
    client._last_contact = time.monotonic()
    assert client._poll("run-1") is None
    client._last_contact -= 2 * DASHBOARD_TIMEOUT_S
    with pytest.raises(OutageError, match=r"no answer from http://head:8265\). Submit the run again"):
        client._poll("run-1")


def test_an_unreachable_dashboard_is_reported(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE)
    started = time.monotonic()
    assert main(["submit", str(tmp_path / "r.yaml"), "--address", "http://127.0.0.1:9"]) == 2
    assert time.monotonic() - started < 120
    assert "cannot reach a Ray dashboard at http://127.0.0.1:9" in capsys.readouterr().err


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def ray_head(folder: Path, env: dict[str, str], num_cpus: int = 2):
    """Run `ray start --head` on loopback and yield the URL of its dashboard. On exit, end all its processes."""
    gcs, dashboard, agent = free_port(), free_port(), free_port()
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", f"--port={gcs}"),
        *(f"--dashboard-port={dashboard}", f"--num-cpus={num_cpus}", f"--temp-dir={folder}"),
        f"--dashboard-agent-listen-port={agent}",  # the default port may be used by other tests
        "--object-store-memory=200000000",
    ]
    with open(folder / "head.log", "wb") as log:
        head = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:

        def is_up() -> bool:
            assert head.poll() is None, (folder / "head.log").read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", dashboard)) == 0

        wait_until(is_up, "the dashboard", pause_s=0.2)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        process = psutil.Process(head.pid)
        started = [process, *process.children(recursive=True)]
        head.terminate()
        _, alive = psutil.wait_procs(started, timeout=5)
        for process in alive:
            with suppress(psutil.NoSuchProcess):  # the process has just ended
                process.kill()
        head.wait()


@pytest.fixture(scope="module")
def dashboard():
    folder = Path("/tmp") / f"m2f-jobs-{os.getpid()}"
    folder.mkdir()
    env = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GLOO_SOCKET_IFNAME": "lo",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "OWN_SECRET": "hush",
    }
    with ray_head(folder, env) as address:
        yield address
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Write a recipe and its shards to a folder that driver and workers share, and return the folder."""
    folder = tmp_path_factory.mktemp("shared")
    source = SyntheticSource(num_images=8)
    dataset = DatasetConfig(shards=str(folder / "shards"), source=source)
    write_dataset(open_reader(source), dataset, Storage())
    (folder / "recipe.yaml").write_text(f"""
name: job
output: {folder}/runs
datasets: {{train: {{shards: {folder}/shards}}}}
data: {{train: [{{dataset: train}}], augment: {{kind: lsj, size: 64, min_scale: 0.8, max_scale: 1.2}}, workers: 0}}
model:
  backbone: {{name: resnet10t, norm: group, options: {{channels: [8, 16, 16, 32]}}}}
  pixel_decoder: {{conv_dim: 16, mask_dim: 16, num_layers: 1, num_heads: 2, feedforward_dim: 32}}
  transformer_decoder: {{num_queries: 8, num_layers: 2, hidden_dim: 16, num_heads: 2, feedforward_dim: 32}}
  loss: {{num_points: 64}}
training: {{max_steps: 100000, global_batch: 2, checkpoint: {{every_steps: 1000000}}, log_every_steps: 1}}
""")
    return folder


def wait_for_steps(config, attempts: int) -> None:
    """Wait until at least `attempts` attempts have a trace, and the last trace has at least four steps."""

    def is_training() -> bool:
        traces = sorted(Path(config.run_folder).glob("traces/*/rank_0000.jsonl"))
        return len(traces) >= attempts and len(traces[-1].read_text().splitlines()) >= 4

    wait_until(is_training, "the steps of the job", pause_s=0.5)


def kill_driver() -> None:
    """Kill the driver of the job, and assert that it has inherited the environment variables of its node."""
    (driver,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if (words := process.info["cmdline"] or []) and words[-2:] == ["train", "recipe.yaml"]
    ]
    assert driver.environ()["OWN_SECRET"] == "hush"
    driver.kill()


def m2f(*words, token=TOKEN) -> subprocess.CompletedProcess:
    """Run m2f in a separate process, because Ray reads the token when it is imported."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"RAY_AUTH_TOKEN": token}
    command = [sys.executable, "-m", "m2f.cluster.cli", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.fixture
def submit(shared, dashboard):
    recipe = str(shared / "recipe.yaml")
    return lambda *words: m2f("submit", recipe, "--address", dashboard, "--shared", str(shared), *words)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_wrong_token_is_reported_with_the_remedy(dashboard):
    result = m2f("submit", "--status", "some-job", "--address", dashboard, token="f" * 64)
    assert result.returncode == 2
    assert "requires a different token" in result.stderr
    assert "ray get-auth-token" in result.stderr


@pytest.mark.cluster
@pytest.mark.slow
def test_run_is_submitted_followed_and_stopped(submit, shared):
    """The driver of a long job is killed and restarts. Then `--stop` ends the job with a checkpoint."""
    config = load_recipe(shared / "recipe.yaml")
    submitted = submit("--detach")
    assert submitted.returncode == 0, submitted.stderr
    followed: list[subprocess.CompletedProcess] = []
    follower = threading.Thread(target=lambda: followed.append(submit()))
    follower.start()
    wait_for_steps(config, attempts=1)
    kill_driver()
    wait_for_steps(config, attempts=2)
    stopped = submit("--stop")
    follower.join()
    assert stopped.returncode == 0, stopped.stderr
    assert "STOPPED" in stopped.stdout
    assert f"the run already has a job: {job_name(config)}-1" in followed[0].stdout
    assert re.search(r"step +3/", followed[0].stdout), followed[0].stdout
    assert followed[0].returncode == ExitStatus.STOPPED
    assert "the driver was killed (SIGKILL)" in followed[0].stdout
    assert followed[0].stdout.count("stopping after a checkpoint") == 1
    (checkpoint,) = list_checkpoints(Storage(), config.run_folder)
    assert checkpoint.step >= 3
    status = submit("--status")
    assert [line.split()[1] for line in status.stdout.splitlines()] == ["STOPPED"]


@pytest.mark.cluster
@pytest.mark.slow
def test_a_failed_job_gives_its_exit_status(submit, shared):
    result = submit("name=broken", f"datasets.train.shards={shared}/absent")
    assert result.returncode == 2
    assert f"{shared}/absent" in result.stdout


@pytest.mark.cluster
@pytest.mark.slow
def test_the_doctor_checks_every_node(dashboard):
    """The doctor runs as a Ray job with one task per node, and the command returns its exit status."""
    result = m2f("doctor", "--address", dashboard)
    assert result.returncode == 0, result.stdout + result.stderr
    expected = ("gloo all-reduce over 2 processes", "clocks of all nodes agree", "the same Python and Ray")
    printed = " ".join(result.stdout.split())  # the table wraps lines
    for words in (*expected, "rejects requests without a token"):
        assert words in printed


@pytest.mark.cluster
@pytest.mark.slow
def test_doctor_reports_a_cluster_without_token_authentication():
    """The cluster runs without tokens, although the environment of the doctor has one."""
    folder = Path("/tmp") / f"m2f-open-{os.getpid()}"
    folder.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    env |= {"RAY_AUTH_MODE": "disabled", "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    with ray_head(folder, env) as address:
        result = m2f("doctor", "--address", address)
    shutil.rmtree(folder, ignore_errors=True)
    assert result.returncode == 1, result.stdout + result.stderr
    printed = " ".join(result.stdout.split())
    assert "accepts jobs without a token: anyone who can reach it can run code on the nodes" in printed
    assert "start all nodes with RAY_AUTH_MODE=token" in printed
