"""Write a trained model in one of the formats of `m2f export`. A failed export leaves no output."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, assert_never

from m2f.cluster.predict.trained_model import TrainedModel
from m2f.model.errors import ConfigError
from m2f.model.export.graphs import (
    export_hugging_face,
    export_program,
    require_onnx,
    write_onnx,
    write_program,
)
from m2f.model.export.hugging_face import class_in_transformers
from m2f.model.export.official import write_official
from m2f.trainer.checkpoint.identity import METADATA_KEY

Format = Literal["official", "hugging_face", "torch_export", "onnx"]
_SUFFIXES: dict[Format, str] = {"official": ".pth", "hugging_face": "", "torch_export": ".pt2", "onnx": ".onnx"}


def check_output(format: Format, output: str, size: Sequence[int] | None) -> None:  # noqa: A002 - the word of the command line
    """Raise ConfigError if the output or `size` does not suit the format, or the output exists.

    Raises WeightsError if the packages for ONNX are missing. Call this before any work is done.
    """
    suffix = _SUFFIXES[format]
    if size is not None and format not in ("torch_export", "onnx"):
        raise ConfigError(f"--size applies only to the formats torch_export and onnx, not to {format}")
    if "://" in output:
        raise ConfigError(f"--output is {output}; give a local path, and copy the export from there")
    if Path(output).suffix != suffix and suffix:
        raise ConfigError(f"--output is {output}; for --format {format} its name must end in {suffix}")
    if Path(output).exists():
        raise ConfigError(f"--output {output} exists; remove it or choose another name")
    if format == "onnx":
        require_onnx()


def write_model(trained: TrainedModel, format: Format, output: Path, size: tuple[int, int] | None = None) -> str:  # noqa: A002
    """Write the model to a path that does not exist yet, and return a description of the output.

    `size` fixes the height and width in pixels of the images that an exported graph accepts. With None, the graph
    accepts all sizes whose sides are divisible by 32.
    """
    metadata = {METADATA_KEY: trained.identity.to_json()}
    match format:
        case "official":
            _write_atomically(output, lambda path: write_official(trained.model, trained.config, path, metadata))
            return "checkpoint with the official parameter names"
        case "hugging_face":
            _write_atomically(output, lambda path: _write_hugging_face(trained, path))
            return f"Hugging Face {class_in_transformers(output)} with {len(trained.classes)} classes"
        case "torch_export" | "onnx":
            model = trained.model.cpu()
            program = export_program(model, size)
            write = write_program if format == "torch_export" else write_onnx
            names = _write_atomically(output, lambda path: write(program, path, metadata))
            sizes = "sides divisible by 32" if size is None else f"{size[0]} x {size[1]} pixels"
            together = f"; keep {' and '.join(names)} in one folder" if len(names) > 1 else ""
            return f"graph for any number of images with {sizes}{together}"
        case _:
            assert_never(format)


def _write_hugging_face(trained: TrainedModel, folder: Path) -> None:
    export_hugging_face(
        trained.model,
        trained.config,
        folder,
        [category.name for category in trained.classes],
        notes=trained.notes(),
        shortest_edge=trained.evaluation.shortest_edge,
        max_size=trained.evaluation.max_size,
    )


def _write_atomically(output: Path, write: Callable[[Path], None]) -> list[str]:
    """Write in a temporary folder and move the files beside each other, so that a failed export leaves no output.

    Return the names of the files or folders: that of the output, and of others that `write` added beside it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}.partial.", dir=output.parent) as folder:
        # The name is already the final one, because ONNX files state the name of the file with their weights.
        write(Path(folder, output.name))
        names = sorted(os.listdir(folder), reverse=True)  # a file of weights before the output that refers to it
        for name in names:
            Path(folder, name).rename(output.with_name(name))
    return names[::-1]
