import socket
import subprocess
import sys
from dataclasses import replace

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

import m2f.model.weights.hub
from m2f.model.backbones.build import build_backbone
from m2f.model.config import ModelConfig, TimmBackboneConfig
from m2f.model.errors import ConfigError, WeightsError
from m2f.model.weights.hub import _Listing, hub_folder, pin_revision, unavailable_reason
from m2f.model.weights.sources import HubAddress
from tests.model.weights.hub_server import COMMIT, REPO, serve_hub
from tests.waiting import PATIENCE_S

ADDRESS = f"hub:{REPO}"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mask2former"}')
    (folder / "pytorch_model.bin").write_bytes(b"code")
    (folder / "README.md").write_text("words")
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # conftest.py sets it; this hub is local
    with serve_hub(model) as hub:
        use_endpoint(monkeypatch, hub.url)
        yield hub


def use_endpoint(monkeypatch, url):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
def test_a_revision_is_pinned_to_its_commit(hub, revision):
    assert pin_revision(ADDRESS + revision) == f"{ADDRESS}@{COMMIT}"


def test_availability_is_checked_without_downloading_weights(hub, model, monkeypatch):
    assert unavailable_reason(REPO) is None
    assert "the hub has no someone/else" in str(unavailable_reason("someone/else"))
    assert not any("safetensors" in request for request in hub.requests)
    hub_folder(ADDRESS, weights=False)
    use_endpoint(monkeypatch, closed_port())
    assert "does not answer" in str(unavailable_reason(REPO))  # the cache has no weights
    use_endpoint(monkeypatch, hub.url)
    hub_folder(ADDRESS)
    use_endpoint(monkeypatch, closed_port())
    assert unavailable_reason(REPO) is None


def test_weights_of_timm_in_the_cache_need_no_network(hub, model, monkeypatch):
    (model / "model.safetensors").unlink()
    huggingface_hub.hf_hub_download(REPO, "pytorch_model.bin")  # timm accepts it if there is no safetensors file
    use_endpoint(monkeypatch, closed_port())
    assert unavailable_reason(REPO) is None


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (200, r"answers with an error \(not a description of a model: .*\); set model.weights"),
        (401, r"answers with an error \(.*401.*\); set HF_TOKEN to a token that may read it; set model.weights"),
        (403, r"answers with an error \(.*403.*\); set HF_TOKEN to a token that may read it; set model.weights"),
        (429, r"answers with an error \(.*429.*\); set model.weights"),
        (500, r"answers with an error \(.*500.*\); set model.weights"),
    ],
)
def test_an_answer_that_is_an_error_is_not_called_silence(hub, status, reason):
    hub.failure = status
    with pytest.raises(WeightsError, match=reason):
        pin_revision(ADDRESS)


def test_a_refused_download_names_the_token(hub, monkeypatch):
    monkeypatch.setattr(m2f.model.weights.hub, "_query_hub", lambda *_: _Listing(COMMIT, ("config.json",)))
    hub.failure = 401
    with pytest.raises(WeightsError, match=r"the download failed \(.*\); set HF_TOKEN to a token that may read it; "):
        pin_revision(ADDRESS)


def test_only_safetensors_and_config_files_are_downloaded_and_only_once(hub):
    folder = hub_folder(ADDRESS)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert folder.name == COMMIT
    num_requests = len(hub.requests)
    assert hub_folder(f"{ADDRESS}@{COMMIT}") == folder
    assert len(hub.requests) == num_requests
    hub_folder(ADDRESS)
    assert sorted(hub.fetched) == ["config.json", "model.safetensors"]


def test_config_files_can_be_downloaded_without_weights(hub):
    hub_folder(ADDRESS, weights=False)
    assert hub.fetched == ["config.json"]
    hub_folder(ADDRESS)
    assert hub.fetched == ["config.json", "model.safetensors"]


def test_all_files_of_sharded_weights_are_downloaded(hub, model):
    (model / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        save_file({name: torch.ones(1)}, model / name)
    (model / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "%s", "b": "%s"}}' % (names[0], names[1])  # noqa: UP031 - braces of JSON
    )
    assert {path.name for path in hub_folder(ADDRESS).iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        *names,
    }


def test_a_model_without_safetensors_is_refused(hub, model):
    (model / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"has neither model.safetensors nor .*other files may contain code"):
        hub_folder(ADDRESS)
    assert hub.fetched == ["config.json"]


@pytest.mark.parametrize("address", ["hub:someone/else", f"{ADDRESS}@v2"])
def test_an_unknown_model_or_revision_is_named(hub, address):
    with pytest.raises(WeightsError, match="has no such model or revision"):
        pin_revision(address)


def test_cache_is_used_if_the_hub_does_not_answer(hub, monkeypatch):
    folder = hub_folder(ADDRESS)
    use_endpoint(monkeypatch, closed_port())
    assert pin_revision(ADDRESS) == f"{ADDRESS}@{COMMIT}"
    assert hub_folder(ADDRESS) == folder


def test_offline_mode_uses_the_cache_and_sends_no_request(hub, monkeypatch):
    folder = hub_folder(ADDRESS)
    num_requests = len(hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub_folder(f"{ADDRESS}@{COMMIT}") == hub_folder(ADDRESS) == folder
    with pytest.raises(WeightsError, match="which is not in the cache, and HF_HUB_OFFLINE is set"):
        hub_folder("hub:someone/else")
    assert len(hub.requests) == num_requests


@pytest.mark.parametrize("text", ["hub:name", "hub:a/b/c", "hub:a/b@", "hub:../b c"])
def test_malformed_addresses_are_refused(text):
    with pytest.raises(ConfigError, match="write hub:OWNER/NAME"):
        HubAddress.parse(text)


@pytest.mark.parametrize("answers", [False, True], ids=["closed", "silent"])
def test_missing_network_is_a_one_line_error(tmp_path, monkeypatch, answers):
    """Run in a separate process, because huggingface_hub reads the environment at import."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if answers:
            listener.listen()  # accepts connections but never answers
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        command = [sys.executable, "-m", "tests.model.weights.unreachable_hub_main"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    message = done.stdout.strip()
    assert all(text in message for text in ("does not answer", "HF_ENDPOINT", "HF_HUB_OFFLINE=1"))
    assert len(message.splitlines()) == 1


def test_a_backbone_starts_from_a_model_of_the_hub(hub, model, tmp_path):
    config = TimmBackboneConfig(name="resnet10t", options={"channels": (8, 16, 16, 32)}, norm="native")
    source = build_backbone(config)
    save_file({f"backbone.{name}": t for name, t in source.state_dict().items()}, model / "model.safetensors")
    loaded = build_backbone(replace(config, weights=f"{ADDRESS}@{COMMIT}"))
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    with pytest.raises(ConfigError, match=r"model\.backbone\.weights is hub:someone/else.*no such model or revision"):
        build_backbone(replace(config, weights="hub:someone/else"))
    with pytest.raises(ConfigError, match=r"model\.backbone\.weights is 'hub:someone'; write hub:OWNER/NAME"):
        ModelConfig(backbone=replace(config, weights="hub:someone"))
