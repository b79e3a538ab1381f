"""Forward and backward of the scans beside transformers' and mambapy's, interleaved in one process.

python ops.py [--threads 1] [scan-loop scan-pscan ssd]
"""

import argparse
import math

import peers
import torch

from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.kernels.selective_scan import selective_scan

LOOP = [(1, 512, 512, 16), (4, 512, 512, 16)]
PSCAN = [(1, 512, 512, 16), (4, 512, 512, 16), (1, 2048, 512, 16), (8, 256, 256, 16), (1, 1024, 1536, 16)]
SSD = [(4, 512, 8, 64, 64, 64), (1, 2048, 24, 64, 128, 256)]


def scan_args(b: int, t: int, d: int, n: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x, z, delta = torch.randn(3, b, t, d).unbind()
    B, C = torch.randn(2, b, t, n).unbind()
    A = -torch.arange(1.0, n + 1).repeat(d, 1)
    return [v.requires_grad_() for v in (x, delta, A, B, C, torch.ones(d), torch.full((d,), -4.0), z)]


def scans(kind: str, shapes: list) -> None:
    ratios = []
    for b, t, d, n in shapes:
        args = scan_args(b, t, d, n)
        x, delta, A, B, C, D, bias, z = args
        upstream = torch.randn(b, t, d)

        def ours(args=args, upstream=upstream):
            x, delta, A, B, C, D, bias, z = args
            y = selective_scan(x, delta, A, B, C, D, z=z, delta_bias=bias, softplus=True)
            return [y[0], *peers.gradients(y, args, upstream)]

        def peer(args=args, upstream=upstream):
            y = peers.mamba_scan(*args, use_mambapy=kind == "pscan")
            return [y, *peers.gradients([y], args, upstream)]

        worst = max(map(peers.relative, ours(), peer()))
        mine, theirs, ratio = peers.interleaved(ours, peer, 2 if kind == "loop" else 7)
        ratios.append(ratio)
        print(f"scan beside {kind} B{b} T{t} D{d} N{n}: {1e3 * mine:.1f} ms, {1e3 * theirs:.0f} ms, {ratio:.0f}x; "
              f"outputs and gradients differ by {worst:.1e}", flush=True)  # fmt: skip
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"scan beside {kind}: worst {min(ratios):.0f}x, geometric mean {mean:.0f}x")


def ssds() -> None:
    for b, t, h, p, n, chunk in SSD:
        torch.manual_seed(0)
        x, dt = torch.randn(b, t, h, p), torch.rand(b, t, h) * 0.1
        B, C = torch.randn(2, b, t, 1, n).unbind()
        args = [v.requires_grad_() for v in (x, dt, -torch.arange(1.0, h + 1), B, C)]
        upstream = torch.randn(b, t, h, p)

        def ours(args=args, upstream=upstream):
            x, dt, A, B, C = args
            y = linear_recurrence(C, B, x * dt[..., None], dt * A)
            return [y[0], *peers.gradients(y, args, upstream)]

        def peer(args=args, upstream=upstream, chunk=chunk):
            y = peers.ssd(*args, chunk)
            return [y, *peers.gradients([y], args, upstream)]

        worst = max(map(peers.relative, ours(), peer()))
        mine, theirs, ratio = peers.interleaved(ours, peer, 9)
        said = f"{1e3 * mine:.1f} ms, {1e3 * theirs:.0f} ms, {ratio:.1f}x; differ by {worst:.1e}"
        print(f"SSD B{b} T{t} H{h} P{p} N{n} beside chunk {chunk}: {said}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["ssd", "scan-pscan", "scan-loop"])
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(peers.versions())
    for what in asked.what:
        ssds() if what == "ssd" else scans(what[5:], LOOP if what == "scan-loop" else PSCAN)
