import subprocess
import sys

import pytest

LOCAL = (
    "m2f.cluster.recipe.config",
    "m2f.cluster.recipe.load",
    "m2f.cluster.train.driver_restarts",
    "m2f.cluster.train.failure_policy",
    "m2f.cluster.train.local",
    "m2f.cluster.train.processes",
)


@pytest.mark.parametrize("module", LOCAL)
def test_what_the_local_launcher_needs_loads_neither_ray_nor_mlflow(module):
    code = f"import {module}, sys; print(sorted({{'ray', 'mlflow'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
