"""Mask2Former-class segmentation at scale.

    import m2f

    model = m2f.load("runs/demo")
    result = model.predict("photo.jpg")
    result.overlay().save("found.png")

The names in `__all__` are public and documented in docs/python.md. Each name is imported on first use. The subpackages
are `m2f.model`, `m2f.data_pipeline`, `m2f.trainer`, `m2f.eval` and `m2f.cluster`.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds m2f/: a checkout with pyproject.toml and docs/, or the installed packages."""

HOME = Path(__file__).parent
"""The folder that holds model/, data_pipeline/, trainer/, eval/, cluster/ and configs/."""

if not (HOME / "model").is_dir():  # a checkout without symbolic links has text files instead of them
    HOME = HOME.parent
    __path__.append(str(HOME))

_MODULES = {
    "Dataset": "m2f.cluster.api.dataset",
    "Instances": "m2f.eval.arrays",
    "Model": "m2f.cluster.api.model",
    "PanopticImage": "m2f.eval.arrays",
    "Result": "m2f.cluster.api.result",
    "Run": "m2f.cluster.api.train",
    "TrainingFailedError": "m2f.cluster.api.train",
    "UserError": "m2f.model.errors",
    "evaluate": "m2f.cluster.api.evaluate",
    "evaluate_instances": "m2f.eval.functions",
    "evaluate_panoptic": "m2f.eval.functions",
    "evaluate_semantic": "m2f.eval.functions",
    "load": "m2f.cluster.api.model",
    "train": "m2f.cluster.api.train",
}
"""Module that defines each public name."""

__all__ = sorted(_MODULES)  # noqa: PLE0605 - the stub lists them


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'm2f' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
