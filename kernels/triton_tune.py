"""Measure the launch settings of an op's Triton kernels on this GPU, and write the fastest into its `launch.json`.

    python -m hybridlab.kernels.triton_tune op=selective_scan [case=real] [dtype=bfloat16] [batch=8 time=4096 ...]

Every candidate of every kernel runs forward and backward on the case, beside the default: one that does not agree with
it is refused, whatever its speed. Sizes given replace those of the case.
"""

import importlib
import json
import pkgutil
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridlab.kernels import triton_launch
from hybridlab.kernels.op import Op
from hybridlab.kernels.ops import OPS
from hybridlab.kernels.triton_launch import Settings

Results = dict[str, Tensor]
Timer = Callable[[Callable[[], Any]], float]
AGREE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of a candidate with the default; both may round differently
GAIN = 0.02  # a candidate must be faster by this share: below it the difference is noise


def candidates(op: Op) -> dict[str, list[Settings]]:
    """CANDIDATES of every triton_* module in the op's folder."""
    folder = importlib.import_module(f"hybridlab.kernels.{op.name}")
    found: dict[str, list[Settings]] = {}
    for module in pkgutil.iter_modules(folder.__path__):
        if module.name.startswith("triton_"):
            found |= getattr(importlib.import_module(f"{folder.__name__}.{module.name}"), "CANDIDATES", {})
    return found


def run(op: Op, args: dict[str, Any], upstream: list[Tensor]) -> Results:
    """Outputs and gradients of the Triton version by name."""
    leaves = {n: x for n, x in args.items() if isinstance(x, Tensor) and x.is_floating_point()}
    outs = op.get("triton")(**args)
    gradients = torch.autograd.grad(outs, [*leaves.values()], upstream, allow_unused=True)
    named = {f"d{n}": g for n, g in zip(leaves, gradients, strict=True) if g is not None}
    return {f"out{i}": o.detach() for i, o in enumerate(outs)} | named


def apart(got: Results, expected: Results) -> float:
    """The largest relative difference of any result; inf where one holds NaN or is missing."""
    if got.keys() != expected.keys():
        return float("inf")
    errors = [
        ((got[n].double() - x.double()).norm() / x.double().norm().clamp(min=1e-30)).item() for n, x in expected.items()
    ]
    return max((float("inf") if e != e else e for e in errors), default=0.0)


def tune(op: Op, args: dict[str, Any], options: dict[str, list[Settings]], timer: Timer) -> Iterator[tuple]:
    """Yields (kernel, sizes of the launch, settings or None, line to say) per kernel that the op launches for `args`.

    timer   runs a function and returns its seconds; called with forward and backward in one
    """
    dtype = next(x.dtype for x in args.values() if isinstance(x, Tensor) and x.is_floating_point())
    triton_launch.asked.clear()
    outs = op.get("triton")(**args)
    generator = torch.Generator(outs[0].device).manual_seed(1)
    upstream = [torch.randn(o.shape, device=o.device, dtype=o.dtype, generator=generator) for o in outs]
    expected = run(op, args, upstream)
    base = timer(lambda: run(op, args, upstream))
    for kernel, sizes in dict(triton_launch.asked).items():
        best, chosen = base * (1 - GAIN), None
        for option in options.get(kernel, []):
            with triton_launch.using(kernel, **option):
                try:
                    off = apart(run(op, args, upstream), expected)
                    if off > AGREE.get(dtype, AGREE[torch.bfloat16]):
                        yield kernel, sizes, None, f"{kernel} {option}: refused, {off:.1e} from the default's results"
                        continue
                    seconds = timer(lambda: run(op, args, upstream))
                except Exception as error:  # too much shared memory, too many registers: the next one may fit
                    yield kernel, sizes, None, f"{kernel} {option}: refused, {type(error).__name__}: {error}"
                    continue
            yield kernel, sizes, None, f"{kernel} {option}: {1e3 * seconds:.3f} ms beside {1e3 * base:.3f}"
            if seconds < best:
                best, chosen = seconds, option
        yield kernel, sizes, chosen, f"{kernel} [{sizes}]: {chosen or 'the default'}"


def write(path: Path, gpu: str, found: list[tuple[str, str, Settings]]) -> None:
    """Put what was found into a table beside what it holds; the file is whole at every moment."""
    table = json.loads(path.read_text()) if path.exists() else {}
    for kernel, sizes, chosen in found:
        table.setdefault(gpu, {}).setdefault(kernel, {})[sizes] = chosen
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    beside.replace(path)


def seconds_on_gpu(fn: Callable[[], Any], rounds: int = 20) -> float:
    """Median over rounds by events, caches flushed in between."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        fn()
    times = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def main(words: list[str]) -> int:
    given = dict(word.split("=", 1) for word in words if "=" in word)
    ops = {op.name: op for op in OPS if "triton" in op.versions}
    if given.get("op") not in ops or any("=" not in word for word in words):
        print(f"usage: python -m hybridlab.kernels.triton_tune op=NAME [case=real] [size=...]; ops: {[*ops]}")
        return 2
    op = ops[given.pop("op")]
    if not torch.cuda.is_available():
        print(f"settings of {op.name} are measured on a GPU, and torch sees none")
        return 2
    case, dtype = op.cases[given.pop("case", "real")], getattr(torch, given.pop("dtype", "bfloat16"))
    if unknown := given.keys() - case.keys():
        print(f"{op.name} has no sizes {sorted(unknown)}; it has {sorted(case)}")
        return 2
    case = case | {name: int(size) if size.isdigit() else size for name, size in given.items()}
    args = op.make(case, "cuda", dtype, torch.Generator().manual_seed(0))
    for x in args.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    found = []
    for kernel, sizes, chosen, line in tune(op, args, candidates(op), seconds_on_gpu):
        print(line, flush=True)
        if chosen is not None:
            found.append((kernel, sizes, chosen))
    path = Path(triton_launch.__file__).parent / op.name / "launch.json"
    write(path, torch.cuda.get_device_name(), found)
    print(f"wrote {len(found)} settings to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
