"""Run the code cells of a notebook in order, as Jupyter does: notebook_main.py NOTEBOOK [STORED]

With STORED, a copy with the outputs of the cells is written, in which paths are relative to the working directory.
After a change of docs/python.ipynb, run this from an empty folder with docs/python.ipynb as both arguments.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import re
import sys
import types
from pathlib import Path


def run_cell(source, names):
    """Run a cell. Return what it prints, and the value of its last line if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return printed.getvalue().replace(f"{Path.cwd()}/", ""), value


def outputs(printed, value):
    """Return the outputs of a cell in the format of notebooks."""
    found = [{"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)}] if printed else []
    if value is not None:
        data = {"text/plain": re.sub(r" at 0x[0-9A-F]+", "", repr(value)).splitlines(keepends=True)}
        if hasattr(value, "_repr_jpeg_"):
            data["image/jpeg"] = base64.b64encode(value._repr_jpeg_()).decode()
        found.append({"output_type": "display_data", "metadata": {}, "data": data})
    return found


def main(notebook, stored=None):
    content = json.loads(Path(notebook).read_text())
    module = types.ModuleType("__main__")
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = outputs(*run_cell("".join(cell["source"]), vars(module)))
    if stored is not None:
        Path(stored).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
