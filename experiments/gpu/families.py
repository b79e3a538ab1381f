"""What is timed: for each family of recurrences its inputs, ours, the peers, and what a fused pass must move.

Every function takes the same leaves, so that whatever it must do to them first (scaling by a step size, say) is timed.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlab.kernels.causal_conv import causal_conv
from hybridlab.kernels.delta_rule import delta_rule
from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.kernels.selective_scan import selective_scan

Leaves = dict[str, Tensor]
Run = Callable[..., Tensor]  # of the leaves by name


@dataclass(frozen=True)
class Family:
    """make(sizes, randn) -> leaves; ours(leaves, version=) -> y; peers: name -> run; flops(sizes) forward."""

    make: Callable[[dict[str, int], Callable[..., Tensor]], Leaves]
    ours: Run
    flops: Callable[[dict[str, int]], int]
    peers: dict[str, Run] = field(default_factory=dict)
    exps: Callable[[dict[str, int]], int] | None = None  # exponentials of the forward, where they bind


def mamba_ssm() -> Any:
    sys.modules.setdefault(
        "selective_scan_cuda", ModuleType("selective_scan_cuda")
    )  # its package asks for it at import
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined


def fla(module: str, name: str) -> Any:
    return getattr(__import__(f"fla.ops.{module}", fromlist=[name]), name)


def ssd_leaves(s: dict[str, int], randn: Callable[..., Tensor]) -> Leaves:
    b, t, h, p, n = (s[name] for name in ("batch", "time", "heads", "value", "key"))
    # a step of 0.001 to 0.1, an A of -1 to -16: what the layer starts training from
    return dict(
        x=randn(b, t, h, p), dt=(randn(b, t, h).float().sigmoid() * 0.1), A=-(1.0 + 15.0 * randn(h).float().sigmoid()),
        B=randn(b, t, 1, n) * n**-0.5, C=randn(b, t, 1, n),
    )  # fmt: skip


def ssd_ours(x, dt, A, B, C, version: str = "auto") -> Tensor:
    return linear_recurrence(C, B, (x * dt[..., None]).to(x.dtype), dt * A, version=version)[0]


def ssd_mamba(x, dt, A, B, C) -> Tensor:
    return mamba_ssm()(x, dt, A, B, C, chunk_size=256)


def ssd_fla(x, dt, A, B, C) -> Tensor:
    heads = x.shape[2]
    q, k = (v.expand(-1, -1, heads, -1) for v in (C, B))
    return fla("simple_gla", "chunk_simple_gla")(q, k, (x * dt[..., None]).to(x.dtype), g=dt * A, scale=1.0)[0]


def heads_leaves(decay: str | None, delta: bool = False) -> Callable[[dict[str, int], Callable[..., Tensor]], Leaves]:
    def make(s: dict[str, int], randn: Callable[..., Tensor]) -> Leaves:
        b, t, h, k, v = (s[name] for name in ("batch", "time", "heads", "key", "value"))
        q, key = randn(b, t, h, k) * k**-0.5, randn(b, t, h, k)
        leaves = dict(q=q, k=F.normalize(key.float(), dim=-1).to(key.dtype) if delta else key, v=randn(b, t, h, v))
        if decay == "time":
            leaves["g"] = F.logsigmoid(randn(b, t, h).float() + 3.0)
        if decay == "channel":
            leaves["g"] = F.logsigmoid(randn(b, t, h, k).float() + 3.0)
        return leaves | (dict(beta=randn(b, t, h).sigmoid()) if delta else {})

    return make


def retention_decay(v: Tensor) -> Tensor:
    """log(1 - 2^(-5 - head)), the published one."""
    return (-(2.0 ** (-5.0 - torch.arange(v.shape[2], device=v.device, dtype=torch.float64)))).log1p().float()


def retention_ours(q, k, v, version: str = "auto") -> Tensor:
    return linear_recurrence(q, k, v, retention_decay(v), version=version)[0]


def scan_leaves(s: dict[str, int], randn: Callable[..., Tensor]) -> Leaves:
    b, t, d, n = (s[name] for name in ("batch", "time", "d_model", "n"))
    A = -torch.arange(1.0, n + 1, device=randn(1).device).repeat(d, 1)
    return dict(
        x=randn(b, t, d), delta=randn(b, t, d), A=A, B=randn(b, t, n), C=randn(b, t, n), D=randn(d).float(),
        z=randn(b, t, d), delta_bias=randn(d).float() - 4.0,
    )  # fmt: skip


def scan_ours(x, delta, A, B, C, D, z, delta_bias, version: str = "auto") -> Tensor:
    return selective_scan(x, delta, A, B, C, D, z=z, delta_bias=delta_bias, softplus=True, version=version)[0]


def conv_torch(x, weight, bias) -> Tensor:
    y = F.conv1d(x.mT, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[2])
    return F.silu(y[..., : x.shape[1]]).mT


def of_heads(s: dict[str, int]) -> int:
    return s["batch"] * s["time"] * s["heads"] * s["key"] * s["value"]


FAMILIES = {
    "ssd": Family(ssd_leaves, ssd_ours, lambda s: 5 * of_heads(s), {"mamba-ssm": ssd_mamba, "fla simple_gla": ssd_fla}),
    "retention": Family(
        heads_leaves(None), retention_ours, lambda s: 5 * of_heads(s),
        {"fla": lambda q, k, v: fla("retention", "chunk_retention")(q, k, v, scale=1.0)[0]},
    ),
    "scalar decay": Family(
        heads_leaves("time"),
        lambda q, k, v, g, version="auto": linear_recurrence(q, k, v, g, version=version)[0],
        lambda s: 5 * of_heads(s),
        {"fla": lambda q, k, v, g: fla("simple_gla", "chunk_simple_gla")(q, k, v, g=g, scale=1.0)[0]},
    ),
    "gla": Family(
        heads_leaves("channel"),
        lambda q, k, v, g, version="auto": linear_recurrence(q, k, v, g, version=version)[0],
        lambda s: 5 * of_heads(s),
        {"fla": lambda q, k, v, g: fla("gla", "chunk_gla")(q, k, v, g=g, scale=1.0)[0]},
    ),
    "gated delta": Family(
        heads_leaves("time", delta=True),
        lambda q, k, v, g, beta, version="auto": delta_rule(q, k, v, beta, g, version=version)[0],
        lambda s: 7 * of_heads(s),
        {"fla": lambda q, k, v, g, beta: fla("gated_delta_rule", "chunk_gated_delta_rule")(
            q, k, v, g=g, beta=beta, scale=1.0)[0]},
    ),
    "kimi delta": Family(
        heads_leaves("channel", delta=True),
        lambda q, k, v, g, beta, version="auto": delta_rule(q, k, v, beta, g, version=version)[0],
        lambda s: 7 * of_heads(s),
        {"fla": lambda q, k, v, g, beta: fla("kda", "chunk_kda")(q, k, v, g=g, beta=beta, scale=1.0)[0]},
    ),
    "scan": Family(
        scan_leaves, scan_ours, lambda s: 6 * s["batch"] * s["time"] * s["d_model"] * s["n"],
        exps=lambda s: s["batch"] * s["time"] * s["d_model"] * s["n"],
    ),
    "conv": Family(
        lambda s, randn: dict(
            x=randn(s["batch"], s["time"], s["d_model"]), weight=randn(s["d_model"], 4) * 0.5, bias=randn(s["d_model"])
        ),
        lambda x, weight, bias, version="auto": causal_conv(x, weight, bias, silu=True, version=version)[0],
        lambda s: 8 * s["batch"] * s["time"] * s["d_model"],
        {"torch": conv_torch},
    ),
}  # fmt: skip

WIDE = dict(heads=32, key=128, value=128)
SIX = [
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 2048, 16, 128),
    (4, 4096, 64, 128),
    (8, 2048, 32, 256),
    (8, 1024, 8, 64),
]
SHAPES: list[tuple[str, dict[str, int]]] = [  # in order of what matters if time runs out
    ("ssd", dict(batch=8, time=4096, heads=32, value=64, key=128)),
    ("gated delta", dict(batch=1, time=32768) | WIDE),
    ("scan", dict(batch=8, time=4096, d_model=2048, n=16)),
    *(("retention", dict(batch=b, time=t, heads=h, key=d, value=d)) for b, t, h, d in SIX),
    ("ssd", dict(batch=1, time=32768, heads=32, value=64, key=128)),
    ("ssd", dict(batch=8, time=512, heads=8, value=64, key=128)),
    ("scalar decay", dict(batch=4, time=4096, heads=64, key=128, value=128)),
    ("gla", dict(batch=2, time=16384, heads=16, key=128, value=128)),
    ("kimi delta", dict(batch=2, time=16384, heads=16, key=128, value=128)),
    ("conv", dict(batch=8, time=4096, d_model=2048)),
]
SMOKE: list[tuple[str, dict[str, int]]] = [
    ("ssd", dict(batch=1, time=6, heads=2, value=4, key=4)),
    ("retention", dict(batch=1, time=6, heads=2, key=4, value=4)),
    ("gated delta", dict(batch=1, time=6, heads=2, key=4, value=4)),
    ("scan", dict(batch=1, time=6, d_model=4, n=2)),
    ("conv", dict(batch=1, time=6, d_model=4)),
]
