"""The machine: what it computes in, how fast it could be, what it is. Asked once per run, by the entry point only."""

import ctypes
import platform
import statistics
import subprocess
import timeit
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# dense bf16 FLOP/s without sparsity, from the makers' data sheets
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12, "4090": 165e12, "3090": 71e12}


def choose_numerics(kind: str, precision: str) -> dict[str, str]:
    """Autocast dtype and float32 matmul precision for `kind` cpu or cuda; "auto" asks the machine.

    bf16 pays on a CPU only where it multiplies bf16 natively. "medium" is taken where a product proves faster and as
    exact as float32 (some CPUs have such a path; on others it halves the speed).
    """
    if precision != "auto":
        return {"precision": precision, "matmul": "highest"}
    if kind == "cuda":
        return {"precision": "bf16" if torch.cuda.is_bf16_supported() else "fp32", "matmul": "highest"}
    native = any(flag in _cpuinfo() for flag in ("avx512_bf16", "amx_bf16", " bf16"))
    a, b = torch.randn(2, 1024, 1024, generator=torch.Generator().manual_seed(0))
    ratios = []
    for _ in range(9):  # in turn, so that a busy moment falls on both
        highest = _seconds(lambda: a @ b, 2)
        torch.set_float32_matmul_precision("medium")
        ratios.append(_seconds(lambda: a @ b, 2) / highest)
        torch.set_float32_matmul_precision("highest")
    torch.set_float32_matmul_precision("medium")
    error = _error(a[:256, :256], b[:256, :256])
    torch.set_float32_matmul_precision("highest")
    faster = statistics.median(ratios) < 0.8 and error <= 1e-6
    return {"precision": "bf16" if native else "fp32", "matmul": "medium" if faster else "highest"}


def keep_memory() -> None:
    """Have glibc keep what is freed instead of giving it back and clearing it anew: 10 % of a training step on a CPU.

    A step frees and takes the same sizes again, so the process grows no larger. Elsewhere this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)


def _error(a: Tensor, b: Tensor) -> float:
    truth = a.double() @ b.double()
    return float((a @ b - truth).norm() / truth.norm())


def peak_flops(kind: str, precision: str) -> float | None:
    """FLOP/s the device could reach: measured on a CPU by one product, from the data sheet on a known GPU."""
    if kind == "cuda":
        return next((peak for name, peak in PEAKS.items() if name in torch.cuda.get_device_name()), None)
    a = torch.ones(1024, 1024, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * 1024**3 / _seconds(lambda: a @ a, 20)


def _seconds(work: Callable[[], Tensor], repeat: int) -> float:
    """The best of several timings, after one to warm up."""
    work()
    return min(timeit.repeat(work, number=1, repeat=repeat))


def environment(kind: str) -> dict[str, Any]:
    """Versions, hardware and the repository's state, for the run's records."""
    cpu = next((line.split(": ")[1] for line in _cpuinfo().splitlines() if line.startswith("model name")), None)
    return {name: version(name) for name in ("torch", "lightning", "hybridlab")} | {
        "python": platform.python_version(), "cpu": cpu or platform.processor(), "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if kind == "cuda" else None, "host": platform.node(),
        "git_commit": _git("rev-parse", "HEAD"), "git_changes": _git("diff", "HEAD", "--stat"),
    }  # fmt: skip


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
