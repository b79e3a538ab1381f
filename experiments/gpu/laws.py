"""What only a GPU can show: isolation and sameness of bits across runs, compilation in one graph, far offsets.

python experiments/gpu/laws.py OUT.json [--op NAME] [--seconds 100] [--smoke]
"""

import argparse
import fcntl
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import CUDA, DEVICE, Record, tests_lab

from hybridlab.kernels.op import Op
from hybridlab.kernels.ops import OPS

FAR = 2**31 + 2**20  # elements, beyond what 32 bits can count


def same_bits(op: Op, case: dict[str, Any], lab: Any) -> dict[str, Any]:
    """Five runs, upstream gradients given: every bit of every output and gradient is the same."""
    args = lab.make(op, case, torch.bfloat16 if CUDA else torch.float32, device=DEVICE)
    upstream = lab.draw_upstream(op, args, seed=1)
    runs = [lab.evaluate(op.get("triton"), args, upstream) for _ in range(5 if CUDA else 2)]
    differ = sorted({n for run in runs[1:] for n in run if not torch.equal(run[n], runs[0][n])})
    return {"ok": not differ, "differ": differ}


def isolation(op: Op, lab: Any, time: int) -> dict[str, Any]:
    """NaN in one packed document changes no bit of any other, in values and gradients."""
    lengths = (time // 5, 0, time // 2, time - time // 5 - time // 2)
    victim = slice(lengths[0], lengths[0] + lengths[2])
    args = lab.make(op, op.cases["tiny"] | dict(batch=1, time=time, docs=lengths), torch.float32, device=DEVICE)
    upstream = lab.draw_upstream(op, args, seed=2)
    clean = lab.evaluate(op.get("triton"), args, upstream)
    along = [n for n, x in args.items() if isinstance(x, torch.Tensor) and n != "state" and x.shape[1:2] == (time,)]
    bad = {n: args[n].clone() for n in along}
    for x in bad.values():
        x[:, victim] = torch.nan
    got = lab.evaluate(op.get("triton"), args | bad, upstream)
    reached = []
    for name in ("out0", *(f"d{n}" for n in along)):
        sides = [slice(0, victim.start), slice(victim.stop, time)]
        reached += [name for s in sides if not torch.equal(got[name][:, s], clean[name][:, s])]
    rows = [0, 1, 3]
    reached += [name for name in ("out1", "dstate") if not torch.equal(got[name][rows], clean[name][rows])]
    return {"ok": not reached and bool(got["out0"][:, victim].isnan().any()), "reached": sorted(set(reached))}


def one_graph(op: Op, lab: Any) -> dict[str, Any]:
    args = lab.make(op, op.cases["packed"] if "packed" in op.cases else op.cases["tiny"], torch.float32, device=DEVICE)
    upstream = lab.draw_upstream(op, args, seed=3)
    eager = lab.evaluate(lambda **a: op(**a, version="triton"), args, upstream)
    backend = "inductor" if CUDA else "aot_eager"
    compiled = torch.compile(lambda **a: op(**a, version="triton"), fullgraph=True, backend=backend)
    got = lab.evaluate(compiled, args, upstream)
    off = max(lab.error(got[name], eager[name]) for name in eager)
    return {"ok": off < 1e-6, "off": off}


def far(op: Op) -> dict[str, Any]:
    """The last tokens of a tensor of more than 2³¹ elements equal those of the tail alone, which forgets the rest."""
    tail, generator = 512, torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16, generator=generator)

    if op.name == "causal_conv":
        d = 4096
        args = dict(x=normal(1, FAR // d, d), weight=normal(d, 4))
    elif op.name in ("linear_recurrence", "delta_rule"):
        h, d, time = 64, 128, FAR // (64 * 128)
        decay = torch.full((1, time, h), -2.0, device=DEVICE)
        args = dict(q=normal(1, time, 1, d), k=normal(1, time, 1, d), v=normal(1, time, h, d), log_decay=decay)
        args["k"] = args["k"] / args["k"].norm(dim=-1, keepdim=True)
        if op.name == "delta_rule":
            args["beta"] = torch.full((1, time, h), 0.5, device=DEVICE, dtype=torch.bfloat16)
    elif op.name == "selective_scan":
        d, n = 4096, 4
        time = FAR // d
        args = dict(x=normal(1, time, d), delta=normal(1, time, d).abs(), B=normal(1, time, n), C=normal(1, time, n))
        args["A"] = torch.full((d, n), -2.0, device=DEVICE, dtype=torch.bfloat16)
    else:
        return {"ok": None, "why": "no such case for this op"}
    time = args["x" if "x" in args else "v"].shape[1]
    whole = op(**args, version="triton")[0][:, -tail // 2 :].clone()
    end = {n: x[:, -tail:] if x.dim() > 2 else x for n, x in args.items()}
    alone = op(**end, version="triton")[0][:, -tail // 2 :]
    off = ((whole.double() - alone.double()).norm() / alone.double().norm()).item()
    return {"ok": off < 1e-2, "off": off, "time": time}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--op")
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    lab, record = tests_lab(), Record(asked.out, asked.seconds)
    for op in OPS:
        if "triton" not in op.versions or asked.op not in (None, op.name):
            continue
        case = op.cases["tiny"] if asked.smoke else op.cases["real"]
        record.case(f"{op.name} same bits", lambda op=op, case=case: same_bits(op, case, lab))
        if "docs" in op.cases["tiny"]:
            time = 20 if asked.smoke else 300
            record.case(f"{op.name} isolation", lambda op=op, time=time: isolation(op, lab, time))
        if not asked.smoke:
            record.case(f"{op.name} one graph", lambda op=op: one_graph(op, lab))
            with (Path(tempfile.gettempdir()) / "hybridlab-far-offsets").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # tens of gigabytes: one op at a time
                record.case(f"{op.name} far offsets", lambda op=op: far(op))
                torch.cuda.empty_cache()
    return 0 if record.passed() else 1


if __name__ == "__main__":
    sys.exit(main())
