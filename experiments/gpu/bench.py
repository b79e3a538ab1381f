"""Time of our Triton kernels, with the peers that are installed beside them, and the error of each against float64.

    python experiments/gpu/bench.py OUT.json [--family NAME] [--seconds 240] [--warm] [--smoke]

Rounds of ours and the peers alternate; medians by events on the device, caches flushed before each. --warm runs each
once and times nothing: what is compiled then need not be compiled again. On a CPU it proves that the script runs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import CUDA, DEVICE, Record
from families import FAMILIES, SHAPES, SMOKE, Leaves, Run

DTYPE = torch.bfloat16 if CUDA else torch.float32
EXPS = 16 * 1.98e9  # per multiprocessor and second: 16 a clock, at the boost clock of the data sheet


def once(fn: Callable[[], Any]) -> float:
    """Milliseconds on the device."""
    if not CUDA:
        began = time.perf_counter()
        fn()
        return 1e3 * (time.perf_counter() - began)
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    begin.record()
    fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def medians(runs: dict[str, Callable[[], Any]], budget_s: float) -> dict[str, float]:
    """Median milliseconds of each, in turn, after three rounds to warm up; 5 to 50 rounds, as many as there is time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    began, rounds = time.monotonic(), 0
    while rounds < (8 if CUDA else 1) or (CUDA and rounds < 53 and time.monotonic() - began < budget_s):
        for name, fn in runs.items():
            times[name].append(once(fn))
        rounds += 1
    return {name: round(statistics.median(t[3:] or t), 4) for name, t in times.items()}


def ceilings() -> dict[str, float]:
    """Bytes per second of a copy (read and written), and FLOP/s of a bf16 product, measured here."""
    if not CUDA:
        return {"bytes_s": float("nan"), "flop_s": float("nan")}
    x = torch.randn(1 << 30, dtype=torch.bfloat16, device="cuda")
    y, a = torch.empty_like(x), torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    ms = medians({"copy": lambda: y.copy_(x), "product": lambda: a @ a}, 2.0)
    return {"bytes_s": 2 * x.nbytes / ms["copy"] * 1e3, "flop_s": 2 * 8192**3 / ms["product"] * 1e3}


def gradients(run: Run, leaves: Leaves, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    y = run(**leaves)
    grads = torch.autograd.grad(y, [*leaves.values()], upstream.to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def errors(got: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        name: float(f"{((got[name].double() - x).norm() / x.norm().clamp(min=1e-30)).item():.2e}")
        for name, x in truth.items()
    }


def bound(
    family: str, sizes: dict[str, int], leaves: Leaves, y: torch.Tensor, top: dict[str, float]
) -> dict[str, float]:
    """Milliseconds no fused pass can beat: bytes moved once, FLOPs of the mathematics, exponentials where they bind.

    Training reads the inputs twice, writes y and reads its gradient, writes the gradients of the inputs.
    """
    inputs, out = sum(x.nbytes for x in leaves.values()), y.nbytes
    flops, found = FAMILIES[family].flops(sizes), {}
    for name, moved, work in (("forward", inputs + out, 1), ("training", 3 * inputs + 2 * out, 3)):
        found[name] = 1e3 * max(moved / top["bytes_s"], work * flops / top["flop_s"])
        if (exps := FAMILIES[family].exps) and CUDA:
            rate = EXPS * torch.cuda.get_device_properties(0).multi_processor_count
            found[name] = max(found[name], 1e3 * (2 if work == 3 else 1) * exps(sizes) / rate)
    return {name: round(ms, 4) for name, ms in found.items()}


def compare(family: str, sizes: dict[str, int], top: dict[str, float], smoke: bool, warm: bool) -> dict[str, Any]:
    kind, generator = FAMILIES[family], torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=DTYPE, generator=generator)

    leaves = {name: x.detach().requires_grad_() for name, x in kind.make(sizes, randn).items()}
    runs: dict[str, Run] = {"ours": lambda **v: kind.ours(**v, version="triton")}
    row: dict[str, Any] = {"sizes": sizes, "dtype": str(DTYPE)[6:], "peers": {}}
    with torch.no_grad():
        y = runs["ours"](**leaves)
    upstream = randn(*y.shape)
    for name, peer in ({} if smoke else kind.peers).items():
        try:
            gradients(peer, leaves, upstream)
            runs[name] = peer
        except Exception as error:  # not installed, or broken here: said, and ours is timed all the same
            row["peers"][name] = f"{type(error).__name__}: {str(error)[:200]}"
    if warm:
        gradients(runs["ours"], leaves, upstream)
        return row
    ran = {name: gradients(run, leaves, upstream) for name, run in runs.items()}
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        gradients(runs["ours"], leaves, upstream)
        row["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    forward = medians({name: lambda run=run: run(**leaves) for name, run in runs.items()}, 4.0)
    training = medians({name: lambda run=run: gradients(run, leaves, upstream) for name, run in runs.items()}, 6.0)
    least = bound(family, sizes, leaves, y, top)
    row |= {"forward_ms": forward, "training_ms": training, "bound_ms": least}
    row["of_bound"] = {w: round(least[w] / ms["ours"], 3) for w, ms in (("forward", forward), ("training", training))}
    row["speedup"] = {
        n: {"forward": round(forward[n] / forward["ours"], 2), "training": round(training[n] / training["ours"], 2)}
        for n in runs if n != "ours"
    }  # fmt: skip
    try:  # truth is the matmul form in float64, which the tests hold to 1e-10 of the definition
        wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
        exact = gradients(lambda **v: kind.ours(**v, version="chunked"), wide, upstream.double())
        row["errors"] = {name: errors(got, exact) for name, got in ran.items()}
        row["ok"] = not any(e != e or e > 0.05 for e in row["errors"]["ours"].values())
    except torch.OutOfMemoryError as error:
        row["errors"] = f"no truth: {str(error)[:100]}"
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--family", choices=[*FAMILIES])
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    record, top = Record(asked.out, asked.seconds), ceilings()
    if not asked.warm:
        record.case("ceilings", lambda: dict(top))
    for family, sizes in SMOKE if asked.smoke else SHAPES:
        if asked.family in (None, family):
            label = f"{family} " + " ".join(f"{n}={x}" for n, x in sizes.items())
            record.case(label, lambda f=family, s=sizes: compare(f, s, top, asked.smoke, asked.warm))
            if CUDA:
                torch.cuda.empty_cache()
    return 0 if record.passed() else 1


if __name__ == "__main__":
    sys.exit(main())
