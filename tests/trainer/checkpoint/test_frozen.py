"""Reading checkpoints with frozen weights in a separate file: weights, exported files and packages are complete."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2f.cluster.registry.package import PackageContent, _copy_checkpoint
from m2f.cluster.verbs.checkpoint import _export
from m2f.data_pipeline.config import StorageConfig
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.errors import WeightsError
from m2f.model.mask2former import build_model
from m2f.model.weights.files import FROZEN_KEY, read_state
from m2f.trainer.checkpoint.folder import MANIFEST, CheckpointManifest, file_entry, frozen_name, read_manifest
from m2f.trainer.checkpoint.frozen import write_frozen
from m2f.trainer.checkpoint.resume import Restart
from m2f.trainer.checkpoint.weights import fetched_weights, manifest_sha256, weights_url
from m2f.trainer.errors import CheckpointError
from m2f.trainer.reporting import CommittedCheckpoint
from m2f.trainer.state import TrainState
from tests.trainer.tiny_job import MODEL

STATE = {"backbone.w": torch.ones(3), "transformer_decoder.w": torch.zeros(2)}


@pytest.fixture
def checkpoint(tmp_path):
    """Return a checkpoint folder with weights, their average and a recipe."""
    folder = tmp_path / "step_00000004-1"
    folder.mkdir()
    name = frozen_name(write_frozen({"backbone.w": STATE["backbone.w"]}, folder))
    for file in ("weights.safetensors", "ema.safetensors"):
        trained = {"transformer_decoder.w": STATE["transformer_decoder.w"]}
        save_file(trained, folder / file, {"format": "pt", FROZEN_KEY: name, "note": "kept"})
    for file in ("identity.json", "recipe.yaml"):
        (folder / file).write_text("{}")
    files = {path.name: file_entry(path) for path in folder.iterdir()}
    (folder / MANIFEST).write_bytes(CheckpointManifest(4, 1, 1, files).to_json())
    return folder


def assert_complete(state):
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], value) for name, value in STATE.items())


def spoil(folder):
    path = next(folder.glob("frozen-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def test_weights_of_a_local_checkpoint_are_complete_and_verified(checkpoint):
    url = weights_url(str(checkpoint), Storage())
    with fetched_weights(url, Storage()) as path:
        assert_complete(read_state(path))
    spoil(checkpoint)
    with (
        pytest.raises(CheckpointError, match=r"step_00000004-1 is damaged: the checksum of frozen-\w+\.safetensors"),
        fetched_weights(url, Storage()),
    ):
        pass
    next(checkpoint.glob("frozen-*")).unlink()
    with fetched_weights(url, Storage()) as path, pytest.raises(WeightsError, match=r"frozen-\w+\.safetensors; copy"):
        read_state(path)


def test_weights_of_a_checkpoint_in_object_storage_are_complete_and_verified(checkpoint, s3_endpoint, bucket):
    storage, url = Storage(StorageConfig(endpoint_url=s3_endpoint)), join(bucket, "run/checkpoints/step_00000004-1")
    for path in checkpoint.iterdir():
        storage.put_file(join(url, path.name), path)
    with fetched_weights(weights_url(url, storage), storage) as path:
        assert_complete(read_state(path))
    spoil(checkpoint)
    frozen = next(checkpoint.glob("frozen-*"))
    storage.put_file(join(url, frozen.name), frozen)
    with (
        pytest.raises(CheckpointError, match=r"step_00000004-1 is damaged: the checksum of frozen-\w+\.safetensors"),
        fetched_weights(weights_url(url, storage), storage),
    ):
        pass


def test_the_digest_of_weights_depends_on_the_frozen_ones(checkpoint):
    before = manifest_sha256(str(checkpoint / "weights.safetensors"), Storage())
    entry = write_frozen({"backbone.w": torch.zeros(3)}, checkpoint)
    trained = {"transformer_decoder.w": STATE["transformer_decoder.w"]}
    save_file(trained, checkpoint / "weights.safetensors", {"format": "pt", FROZEN_KEY: frozen_name(entry)})
    assert file_entry(checkpoint / "weights.safetensors").sha256 != before


def test_exported_weights_are_one_file_with_all_tensors(checkpoint, tmp_path):
    for averaged in (False, True):
        target = tmp_path / f"{averaged}.safetensors"
        assert _export(Storage(), str(checkpoint), str(target), averaged) == 0
        assert_complete(load_file(target))
        assert b'"note":"kept"' in target.read_bytes()
        assert FROZEN_KEY.encode() not in target.read_bytes()


def test_a_registered_package_contains_the_frozen_weights(checkpoint, tmp_path):
    content = PackageContent(
        checkpoint=str(checkpoint), trained=SimpleNamespace(identity=None), thresholds=None, allowed_hosts=()
    )
    folder = Path(_copy_checkpoint(content, tmp_path / "package", Storage()))
    assert not (folder / "weights.safetensors").exists()  # the average is registered
    with fetched_weights(str(folder / "ema.safetensors"), Storage()) as path:
        assert_complete(read_state(path))
    assert read_manifest(Storage(), str(folder)).frozen == read_manifest(Storage(), str(checkpoint)).frozen


def test_a_resumed_run_must_freeze_what_the_file_contains(tmp_path):
    def model_with(*freeze: str):
        return build_model(replace(MODEL, freeze=freeze), pretrained_backbone=False)

    first = model_with("backbone")
    weights = {name: tensor + 1 for name, tensor in first.state_dict().items() if name in first.frozen_names()}
    name = frozen_name(write_frozen(weights, tmp_path))
    state = TrainState(order_fingerprint="", seed=0, world_size=1, zero_stage=1)
    restart = Restart(CommittedCheckpoint(4, "run/checkpoints/step_00000004-1"), state, tmp_path, True, 1, name)
    restart.load_model(first)
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in weights.items())
    for freeze, differing in (((), "backbone"), (("backbone", "pixel_decoder"), "pixel_decoder")):
        with pytest.raises(CheckpointError, match=rf"-1 is rejected: model.freeze .* they differ in {differing}\."):
            restart.load_model(model_with(*freeze))
