"""Every Triton kernel against its definition in float64, outputs and gradients, with the budget of the tests.

python experiments/gpu/agree.py OUT.json [--op NAME] [--dtype bfloat16] [--seconds 200] [--smoke]
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from common import DEVICE, Record, tests_lab

from hybridlab.kernels.op import Op
from hybridlab.kernels.ops import OPS

SLACK, CEILING = 2.0, {torch.float32: (1e-5, 2e-5), torch.bfloat16: (5e-3, 1e-2)}  # as in tests/kernels
HEADS = dict(batch=2, time=200, heads=2, groups=2, state=True, docs=None)
PACKED = dict(batch=1, docs=(70, 0, 1, 64, 65))
# Where compilers for Hopper have computed wrong gradients: tiles of 64, widths of 64, 100, 128; and sizes at the edge.
HOPPER: dict[str, list[dict[str, Any]]] = {
    "causal_conv": [dict(time=300, d_model=100, width=w) for w in (2, 4, 8)] + [PACKED | dict(time=200, d_model=128)],
    "linear_recurrence": [
        HEADS | dict(decay=decay, key=k, value=v)
        for k, v in ((64, 64), (100, 100), (128, 128), (128, 64), (256, 256), (16, 60))
        for decay in ("time", "channel")
    ]
    + [HEADS | dict(decay=None, key=64, value=64), HEADS | dict(decay="head", key=128, value=128, groups=1)]
    + [HEADS | PACKED | dict(decay=decay, key=64, value=64) for decay in ("time", "channel")],
    "delta_rule": [
        HEADS | dict(decay=decay, key=k, value=v, most=2.0)
        for k, v in ((64, 64), (100, 100), (128, 128), (256, 256))
        for decay in ("time", "channel")
    ]
    + [HEADS | dict(decay=None, key=128, value=128)]
    + [HEADS | PACKED | dict(decay=decay, key=64, value=64) for decay in ("time", "channel")],
    "selective_scan": [dict(time=300, d_model=100, n=n) for n in (1, 16, 64)]
    + [PACKED | dict(time=200, d_model=64, n=16)],
}


def cases(op: Op, smoke: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    if smoke:
        yield "tiny", op.cases["tiny"]
        return
    yield from ((name, case) for name, case in op.cases.items() if name != "real")
    for extra in HOPPER.get(op.name, []):
        yield " ".join(f"{n}={x}" for n, x in extra.items()), op.cases["tiny"] | extra


def agreement(op: Op, case: dict[str, Any], dtype: torch.dtype, lab: Any) -> dict[str, Any]:
    """Relative errors by name, the budget of each, and whether all are within it."""
    args = lab.make(op, case, dtype, device=DEVICE)
    if why := op.unavailable("triton", **args):
        return {"ok": None, "why": why}
    upstream = lab.draw_upstream(op, args, seed=1)
    truth = lab.evaluate(op.reference, lab.cast(args, torch.float64), upstream)
    ideal = lab.evaluate(op.reference, lab.cast(args, torch.float32), upstream)
    ours = lab.evaluate(op.get("triton"), args, upstream, strange=True)
    found, worst = {}, 0.0
    for name in truth:
        once = lab.error(ideal[name].to(dtype).double(), truth[name])
        budget = min(max(SLACK * once, torch.finfo(dtype).eps / 2), CEILING[dtype][name.startswith("d")])
        lost = lab.error(ours[name], truth[name])
        found[name] = [float(f"{lost:.2e}"), float(f"{budget:.2e}")]
        worst = max(worst, lost / budget if lost == lost else float("inf"))
    over = {name: pair for name, pair in found.items() if not pair[0] <= pair[1]}
    why = {"why": f"over budget: {over}"} if over else {}
    return {"ok": not over, "of_budget": round(worst, 3), "errors": found, **why}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--op")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    lab, record = tests_lab(), Record(asked.out, asked.seconds)
    torch.backends.cuda.matmul.allow_tf32 = False
    for op in OPS:
        if "triton" not in op.versions or asked.op not in (None, op.name):
            continue
        for name, case in cases(op, asked.smoke):
            for dtype in (torch.float32, torch.bfloat16):
                if asked.dtype in (None, str(dtype)[6:]):
                    label = f"{op.name} {name} {str(dtype)[6:]}"
                    record.case(label, lambda op=op, case=case, dtype=dtype: agreement(op, case, dtype, lab))
    return 0 if record.passed() else 1


if __name__ == "__main__":
    sys.exit(main())
