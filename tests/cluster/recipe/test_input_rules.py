from m2f.cluster.recipe.load import load_recipe, parse_recipe

LITE0 = "package:efficientnet-lite0"
RECIPE = """
name: lite
datasets: {train: {shards: shards}}
data: {train: [{dataset: train}]}
training: {max_steps: 1}
model:
  backbone: {name: tf_efficientnet_lite0, weights: "package:efficientnet-lite0"}
"""


def test_packaged_weights_set_pixel_mean_and_std(caplog, tmp_path):
    (tmp_path / "lite.yaml").write_text(RECIPE)
    config = load_recipe(tmp_path / "lite.yaml")
    assert (config.model.pixel_mean, config.model.pixel_std) == ((127.0,) * 3, (128.0,) * 3)
    assert config.model.backbone.weights == LITE0
    assert f"model.pixel_mean is [127.0, 127.0, 127.0], as {LITE0} expects" in caplog.text


def test_explicit_pixel_mean_is_kept_with_a_warning(caplog, tmp_path):
    (tmp_path / "lite.yaml").write_text(RECIPE + "  pixel_mean: [0, 0, 0]\n  pixel_std: [128, 128, 128]\n")
    assert load_recipe(tmp_path / "lite.yaml").model.pixel_mean == (0.0, 0.0, 0.0)
    assert "model.pixel_mean is [0, 0, 0], but package:efficientnet-lite0 expects [127.0, 127.0, 127.0]" in caplog.text


def test_stored_recipe_loads_without_a_message(caplog):
    assert parse_recipe(RECIPE).model.pixel_std == (128.0,) * 3
    assert caplog.text == ""
