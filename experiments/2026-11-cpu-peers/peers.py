"""What stands beside ours: other people's code as installed, called on the same numbers; and how both are timed."""

import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def versions() -> str:
    found = []
    for name in ("torch", "transformers", "mambapy"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    cpu = next(
        line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ).strip()
    return f"{', '.join(found)}; {cpu}; {torch.get_num_threads()} threads"


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def interleaved(ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of peer / ours over rounds that run both in turn. Both are warm."""
    times = [(seconds(ours), seconds(peer)) for _ in range(rounds)]
    return *(statistics.median(t) for t in zip(*times, strict=True)), statistics.median(b / a for a, b in times)


def mamba_scan(x, delta, A, B, C, D, delta_bias, z, use_mambapy: bool):
    """transformers' selective scan; its loop over time, or mambapy's parallel scan inside it. Layouts as ours."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    x, delta, B, C, z = (t.transpose(1, 2) for t in (x, delta, B, C, z))
    return mamba_selective_scan(
        x, delta, A, B, C, D, z, delta_bias, True, use_mambapy=use_mambapy, use_associative_scan=False
    ).transpose(1, 2)


def ssd(x, dt, A, B, C, chunk: int):
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return mamba2_chunk_scan(x, dt, A, B, C, chunk_size=chunk)


def gradients(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], upstream: torch.Tensor):
    return torch.autograd.grad(outputs[0], inputs, upstream)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()
