"""Compile, without a GPU, every Triton kernel that given cases launch, and say what each takes of a multiprocessor.

    python tests/kernels/compiled.py [op] [--capability 90]

Launches are caught and compiled to machine code for the capability; nothing runs, so results mean nothing. Prints one
line per kernel and case: shared memory, registers per thread, bytes spilled per thread, warps.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from hybridlab.kernels.op import Op
from hybridlab.kernels.ops import OPS

REAL: dict[str, list[dict[str, Any]]] = {
    "causal_conv": [dict(batch=2, time=256, d_model=640, width=4)],
    "linear_recurrence": [
        dict(batch=2, time=256, heads=4, groups=g, key=k, value=v, decay=decay)
        for decay in ("time", "channel")
        for g, k, v in ((4, 64, 64), (1, 128, 64), (4, 100, 100), (4, 128, 128), (4, 256, 256))
    ],
    "delta_rule": [
        dict(batch=2, time=256, heads=4, groups=4, key=k, value=v, decay=decay)
        for decay in ("time", "channel")
        for k, v in ((64, 64), (100, 100), (128, 128), (256, 256))
    ],
    "selective_scan": [dict(batch=2, time=512, d_model=256, n=n) for n in (16, 64)],
    "grouped_matmul": [],
}


def compile_launches(capability: int) -> list[tuple[Any, dict[str, Any]]]:
    """From now on kernels are compiled instead of launched; -> the list that will hold (kernel, its arguments)."""
    target = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )  # fmt: skip
    found: list[tuple[Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((kernel, kwargs))
        return kernel

    JITFunction.run = compile_only
    return found


def resources(kernel: Any, capability: int) -> tuple[int, int]:
    """Registers per thread, and bytes spilled per thread, as the assembler reports them."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    suffix = "a" if capability >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        command = [ptxas, "-v", f"--gpu-name=sm_{capability}{suffix}", source, "-o", Path(folder) / "out"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    return int(registers[1]) if registers else 0, int(spills[1]) if spills else 0


def visit(op: Op, capability: int, found: list) -> None:
    for case in REAL[op.name]:
        for dtype in (torch.bfloat16, torch.float32):
            args = op.make(op.cases["real"] | case, "cpu", dtype, torch.Generator().manual_seed(0))
            for x in args.values():
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    x.requires_grad_()
            found.clear()
            outs = op.get("triton")(**args)
            torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
            said = " ".join(f"{name}={value}" for name, value in case.items() if name not in ("batch", "time"))
            lines = {}
            for kernel, _ in found:
                registers, spills = resources(kernel, capability)
                shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
                lines[kernel.hash] = (
                    f"{op.name} {said} {str(dtype)[6:]} {kernel.metadata.name}: {shared} bytes shared, "
                    f"{registers} registers, {spills} bytes spilled, {warps} warps"
                )
            print("\n".join(lines.values()), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="?")
    parser.add_argument("--capability", type=int, default=90)
    asked = parser.parse_args()
    found = compile_launches(asked.capability)
    for op in OPS:
        if "triton" in op.versions and asked.op in (None, op.name):
            visit(op, asked.capability, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
