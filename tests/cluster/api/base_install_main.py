"""Load, predict, score and export in the current folder: `base_install_main.py HIDDEN,...`.

The folder contains `recipe.yaml`. Imports of the packages in HIDDEN fail; HIDDEN may be empty. The last two lines of
stdout are `done` and the file of the package m2f.
"""

import sys
from collections.abc import Callable

sys.modules |= dict.fromkeys(filter(None, sys.argv[1].split(",")))

import numpy as np  # noqa: E402 - after the packages are hidden
import torch  # noqa: E402

import m2f  # noqa: E402
from m2f.cluster.cli import main  # noqa: E402
from m2f.cluster.recipe.load import load_recipe  # noqa: E402
from m2f.model.mask2former import build_model  # noqa: E402
from m2f.model.weights.names import to_official_names  # noqa: E402


def use_base_features() -> None:
    torch.manual_seed(0)
    config = load_recipe("recipe.yaml").model
    torch.save({"model": to_official_names(build_model(config).state_dict())}, "official.pth")

    model = m2f.load("official.pth", recipe="recipe.yaml", device="auto")
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    results = model.predict([image, image], batch=2)
    assert results[0].masks.shape[1:] == (60, 80)
    results[0].overlay().save("photo.png")
    label_map = model.predict("photo.png", task="semantic").semantic
    scores = m2f.evaluate_semantic([label_map], [label_map], class_names=model.names)
    assert scores.metrics()["mIoU"] == 100.0

    words = ["predict", "recipe.yaml", "photo.png", "--checkpoint", "official.pth", "--output", "out"]
    assert main(words) == 0
    exported = ["--format", "hugging_face", "--output", "theirs"]
    assert main(["export", "recipe.yaml", "--checkpoint", "official.pth", *exported]) == 0
    assert m2f.load("theirs").names == model.names
    require_extra("mlflow", lambda: m2f.load("models:/name@champion"))
    require_extra("boto3", lambda: m2f.load("s3://bucket/run"))
    require_extra("webdataset", lambda: m2f.Dataset([image], [label_map + 0], model.names).write("shards"))
    require_extra("webdataset", lambda: m2f.train("recipe.yaml"))


def require_extra(absent: str, call: Callable[[], object]) -> None:
    try:
        call()
    except m2f.UserError as error:
        message = str(error)
    else:
        message = "no error"
    assert f"needs {absent}, which is not installed: pip install 'm2f[train]'" in message, message


if __name__ == "__main__":
    use_base_features()
    sys.stdout.write(f"done\n{m2f.__file__}\n")
