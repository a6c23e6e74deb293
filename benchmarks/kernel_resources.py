"""`python -m benchmarks.kernel_resources [SM,...] [CHANNELS,...]`: registers, spills and barriers of the fused kernel.

Compiles every launch configuration of the tables in `m2f.model.deform_attn.triton_op` for these compute capabilities
(90 is 9.0) and channels per head, in bfloat16. It needs no GPU, because Triton includes its assembler.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from m2f.model.deform_attn.triton_kernels import backward_kernel, forward_kernel
from m2f.model.deform_attn.triton_op import BACKWARD, FORWARD
from m2f.model.deform_attn.tuning import LaunchConfig

LEVELS, POINTS, WARP = 3, 4, 32
"""Levels and points of the paper's pixel decoder, and threads of a warp."""
REGISTERS = 65_536
"""Number of registers of one multiprocessor of these GPUs."""


@dataclass(frozen=True)
class Resources:
    """Resources of one program of a compiled kernel."""

    registers: int
    """Registers per thread."""
    spilled: int
    """Bytes per thread that are spilled because they do not fit into registers."""
    shared: int
    """Bytes of shared memory per program."""
    barriers: int
    """Number of instructions in the code that synchronise the warps of a program."""

    def resident_warps(self, num_warps: int, limit: int = 64) -> int:
        """Return how many warps a multiprocessor can hold at a time, limited by registers and `limit`."""
        per_warp = -(-self.registers * WARP // 256) * 256
        return min(limit, REGISTERS // (per_warp * num_warps) * num_warps)


def resources(kernel: Any, capability: int, dim: int, config: LaunchConfig, **constants: bool) -> Resources:
    """Compile a kernel for one launch configuration and parse the report of the assembler."""
    sizes = {
        "DIM": dim,
        "LANES": triton.next_power_of_2(dim),
        "LEVELS": LEVELS,
        "POINTS": POINTS,
        "BLOCK": config.block,
    }
    sizes |= {"SAMPLES": triton.next_power_of_2(LEVELS * POINTS), **constants}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in sizes else _type(name) for name in names}
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in sizes.items()},
        attrs={(position,): [["tt.divisibility", 16]] for position, name in enumerate(names) if name.endswith("_ptr")},
    )
    options = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(triton.knobs.nvidia.cuobjdump.path), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    barriers = len(re.findall(r"\bbar(?:rier)?\.(?:cta\.)?sync", compiled.asm["ptx"]))
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared, barriers)


def _type(name: str) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    if name == "levels_ptr":
        return "*i32"
    return "*bf16" if name in ("value_ptr", "logits_ptr", "gradient_ptr", "output_ptr") else "*fp32"


def main(capabilities: str = "80,90,100", channels: str = "32,48,64,96,128") -> None:
    """Print a Markdown table for comma-separated compute capabilities and channels per head."""
    print("| GPU | channels | kernel | queries, warps | registers | spilled bytes | shared bytes | barriers | warps |")
    print("|---|--:|---|---|--:|--:|--:|--:|--:|")
    for capability in map(int, capabilities.split(",")):
        for dim in map(int, channels.split(",")):
            for name, kernel, table, constants in (
                ("forward", forward_kernel, FORWARD.table, {}),
                ("backward", backward_kernel, BACKWARD.table, {"SCATTER": True}),
            ):
                for config in table:
                    used = resources(kernel, capability, dim, config, **constants)
                    print(
                        f"| sm_{capability} | {dim} | {name} | {config.block}, {config.num_warps} | {used.registers} | "
                        f"{used.spilled} | {used.shared} | {used.barriers} | {used.resident_warps(config.num_warps)} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main(*sys.argv[1:])
