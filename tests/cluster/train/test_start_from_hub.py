import multiprocessing
from dataclasses import replace

import huggingface_hub.constants
import pytest
import torch

from m2f.cluster.recipe.load import parse_recipe
from m2f.cluster.recipe.stored import STORED_RECIPE
from m2f.cluster.train import processes
from m2f.cluster.train.local import train_locally
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.config import MSDeformAttnPixelDecoderConfig, SwinBackboneConfig, TimmBackboneConfig
from m2f.model.errors import WeightsError
from m2f.model.export.graphs import export_hugging_face
from m2f.model.mask2former import build_model
from m2f.model.weights.files import read_state, weights_sha256
from m2f.trainer.checkpoint.folder import WEIGHTS, list_checkpoints
from m2f.trainer.checkpoint.identity import IDENTITY, ModelIdentity, StartWeights
from m2f.trainer.config import CheckpointConfig
from tests.cluster.tiny_run import small_sets, tiny_config
from tests.model.weights.hub_server import COMMIT, REPO, serve_hub

pytestmark = pytest.mark.slow
ADDRESS = f"hub:{REPO}"
PINNED = f"{ADDRESS}@{COMMIT}"


@pytest.fixture
def config(tmp_path):
    """Return a run of one step that starts from hub weights, with an architecture that Hugging Face supports."""
    config = tiny_config(tmp_path, "tuned", small_sets(str(tmp_path), Storage()))
    model = replace(
        config.model,
        backbone=TimmBackboneConfig(
            name="resnet50", options={"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 8]}, pretrained=False
        ),
        pixel_decoder=MSDeformAttnPixelDecoderConfig(
            conv_dim=32, mask_dim=16, num_layers=1, num_heads=2, feedforward_dim=32
        ),
        weights=ADDRESS,
    )
    training = replace(config.training, max_steps=1, checkpoint=CheckpointConfig(every_steps=1))
    cluster = replace(config.cluster, num_workers=1)
    evaluation = replace(config.evaluation, sets=())
    return replace(config, model=model, training=training, cluster=cluster, evaluation=evaluation)


@pytest.fixture
def labels(config):
    """Return the 20 class names of the hub model. They include all but one class of the data, in another order."""
    known = [c.name for c in Manifest.load(config.datasets["train"].shards, Storage()).categories.categories]
    return [f"other {i}" for i in range(20 - len(known) + 1)] + known[:0:-1]


@pytest.fixture
def hub(config, labels, tmp_path, monkeypatch):
    # A forked rank would keep the URLs that huggingface_hub read from the environment at its import.
    monkeypatch.setattr(processes, "_SPAWN_CONTEXT", multiprocessing.get_context("spawn"))
    folder = tmp_path / "model"
    hub_model = replace(config.model, num_classes=len(labels))
    torch.manual_seed(0)
    export_hugging_face(build_model(hub_model), hub_model, folder, labels)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv(name, str(int(value)))
    with serve_hub(folder) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def test_run_from_hub_stores_commit_and_digest_and_resumes_without_the_hub(config, labels, hub, tmp_path, capfd):
    run = replace(config, training=replace(config.training, optimizer=replace(config.training.optimizer, lr=1e-12)))
    assert train_locally(run).status == "finished"
    digest = weights_sha256(tmp_path / "model")
    printed = capfd.readouterr()
    assert f"{PINNED} (sha256 {digest})" in printed.out + printed.err
    url = list_checkpoints(Storage(), run.run_folder)[0].url
    identity = ModelIdentity.from_json(Storage().get(f"{url}/{IDENTITY}"), url)
    assert identity.start == (StartWeights(setting="model.weights", source=PINNED, sha256=digest),)
    stored = parse_recipe(Storage().get(f"{run.run_folder}/{STORED_RECIPE}").decode())
    assert stored.model.weights == PINNED

    head = read_state(f"{url}/{WEIGHTS}")["transformer_decoder.class_embed.weight"]
    hub_head = read_state(tmp_path / "model")["class_predictor.weight"]
    for label, category in enumerate(identity.label_spaces[0].classes):
        if category.name in labels:
            torch.testing.assert_close(head[label], hub_head[labels.index(category.name)], rtol=0, atol=1e-6)
    torch.testing.assert_close(head[-1], hub_head[-1], rtol=0, atol=1e-6)  # no object

    num_requests = len(hub.requests)
    longer = replace(run, training=replace(run.training, max_steps=2))
    assert train_locally(longer).status == "finished"
    assert len(hub.requests) == num_requests
    url = list_checkpoints(Storage(), run.run_folder)[0].url
    assert ModelIdentity.from_json(Storage().get(f"{url}/{IDENTITY}"), url).start == identity.start
    assert "settings differ" in (text := capfd.readouterr().err)
    assert "model.weights" not in text.partition("settings differ")[2].partition("weights  ")[0]


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        (
            {"backbone": SwinBackboneConfig()},
            ["model.backbone.kind: timm -> swin", "model.backbone.name: resnet50 -> not set"],
        ),
        (
            {"backbone": TimmBackboneConfig(name="resnet50", pretrained=False)},
            ["options.layers: [1, 1, 1, 1] -> not"],
        ),
        ({"pixel_mean": (0.0, 0.0, 0.0)}, ["model.pixel_mean: [123.675, 116.28, 103.53] -> [0.0, 0.0, 0.0]"]),
    ],
    ids=["backbone", "layers", "pixels"],
)
def test_hub_weights_of_another_architecture_are_rejected_before_the_start(config, hub, changes, rows):
    with pytest.raises(WeightsError, match="whose model differs from the recipe's") as raised:
        train_locally(replace(config, model=replace(config.model, **changes)))
    assert all(row in str(raised.value) for row in rows)
    assert "model.safetensors" not in hub.fetched
