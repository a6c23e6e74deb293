"""Tests of runs whose length is given in epochs."""

from dataclasses import replace

import pytest

from m2f.cluster.recipe.load import dump_recipe
from m2f.cluster.start.epochs import count_steps, images_per_epoch, with_steps
from m2f.data_pipeline.config import MixtureItem
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.errors import ConfigError
from tests.cluster.tiny_run import small_sets, tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("epochs")
    return tiny_config(folder, "epochs", small_sets(str(folder), Storage()))


def in_epochs(config, epochs, *items):
    training = replace(config.training, max_steps=0, max_epochs=epochs)
    return replace(config, training=training, data=replace(config.data, train=items or config.data.train))


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "steps"),
    [(1, 8, 4, 2), (1, 9, 4, 3), (1.5, 8, 4, 3), (0.001, 8, 4, 1), (0.1, 300, 10, 3), (12, 118287, 16, 88716)],
)
def test_steps_of_rounds_up_to_whole_steps(epochs, images, batch, steps):
    assert count_steps(epochs, images, batch) == steps


def test_max_epochs_is_replaced_by_max_steps_and_printed(config, capsys):
    images = images_per_epoch(config, Storage())
    found = with_steps(in_epochs(config, 3), Storage())
    batch = config.training.global_batch
    steps = found.training.max_steps
    assert (steps, found.training.max_epochs) == (-(-3 * images // batch), 0)
    output = f"training.max_epochs 3: {steps:,} steps of {batch} images, {images:.0f} images per epoch\n"
    assert capsys.readouterr().out == output
    assert with_steps(config, Storage()) is config


def test_resuming_with_another_global_batch_is_refused_if_the_length_is_in_epochs(config, monkeypatch):
    stored = dump_recipe(with_steps(in_epochs(config, 3), Storage()))
    monkeypatch.setattr("m2f.cluster.start.epochs.newest_recipe", lambda *_: stored)
    training = replace(config.training, global_batch=2 * config.training.global_batch)
    other = replace(config, training=training)
    with pytest.raises(ConfigError, match=r"Set training\.global_batch to 4, or .*until now 18\)"):
        with_steps(in_epochs(other, 3), Storage())
    assert with_steps(other, Storage()) is other
    assert with_steps(in_epochs(config, 3), Storage()).training.max_steps == 18


def test_images_per_epoch_sums_limited_data_sets(config):
    name = config.data.train[0].dataset
    items = (MixtureItem(dataset=name, limit=3), MixtureItem(dataset=name, limit=2))
    assert images_per_epoch(in_epochs(config, 1, *items), Storage()) == 5
