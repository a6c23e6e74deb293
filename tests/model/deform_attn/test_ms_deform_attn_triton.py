"""The fused kernel in Triton's interpreter, which needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import m2f
from tests.waiting import PATIENCE_S

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="module")
def results():
    script = Path(__file__).with_name("fused_kernel_oracle.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(m2f.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["float32", "reference_per_image", "odd_dim", "many_blocks", "in_order", "batch_16"])
def test_the_kernel_equals_the_plain_form_and_its_gradients(results, case):
    assert max(results[case].values()) < 2e-6, results[case]


@pytest.mark.parametrize(("case", "tolerance"), [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_half_precision_rounds_values_only(results, case, tolerance):
    assert results[case]["output"] < tolerance
    assert results[case]["value"] < tolerance
    assert max(results[case]["offsets"], results[case]["logits"]) < 2e-5  # geometry and softmax stay in float32


def test_every_launch_config_gives_the_same_result_and_timing_has_no_side_effect(results):
    assert len(results["tunings"]) == 6
    for errors in results["tunings"]:
        assert max(errors.values()) < 2e-6, errors


def test_operator_registrations_pass_opcheck(results):
    assert set(results["operator"]) == {"SUCCESS"}


def test_an_operator_is_one_node_of_a_compiled_graph(results):
    assert results["compiled"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kernel_compiles_for_a_gpu_with_sixteen_byte_accesses(direction, tmp_path, monkeypatch):
    """The interpreter accepts code that the compiler rejects.

    No GPU is needed to compile for target 90, the compute capability 9.0 of an H100.
    """
    from triton import compiler
    from triton.backends.compiler import GPUTarget

    from m2f.model.deform_attn import triton_kernels as ms_deform_attn_kernels
    from m2f.model.deform_attn import triton_op as ms_deform_attn_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(ms_deform_attn_kernels, f"{direction}_kernel")
    tuning = getattr(ms_deform_attn_triton, direction.upper()).table[0]
    constants = {"DIM": 32, "LANES": 32, "LEVELS": 3, "POINTS": 4, "SAMPLES": 16, "BLOCK": tuning.block}
    if direction == "backward":
        constants["SCATTER"] = True
    halves = {"value_ptr", "logits_ptr", "output_ptr", "gradient_ptr"}
    signature = {name: "*bf16" if name in halves else "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    signature |= dict.fromkeys(("pixels", "queries", "heads", "reference_per_image"), "i32")
    signature |= {"levels_ptr": "*i32"} | dict.fromkeys(constants, "constexpr")
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    source = compiler.ASTSource(
        kernel,
        {name: signature[name] for name in kernel.arg_names},
        {places[name]: value for name, value in constants.items()},
        {place: [["tt.divisibility", 16]] for name, place in places.items() if name.endswith("_ptr")},
    )
    options = {"num_warps": tuning.num_warps, "enable_fp_fusion": True}
    code = compiler.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    instruction = "ld.global.v4.b32" if direction == "forward" else "red.global.gpu.relaxed.add.v4.f32"
    assert code.count(instruction) == 48  # 3 levels, 4 points, 4 corners


def test_non_finite_location_gives_a_non_finite_result(results):
    assert results["nan"]
