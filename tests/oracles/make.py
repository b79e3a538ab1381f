"""Run published reference code in float64 on tiny inputs, and keep the numbers: `make oracles`.

The packages go to a temporary folder that only this process sees: flash-linear-attention in the environment of the
tests breaks transformers on a machine without a GPU. Of each package only files of plain torch are read. They round to
float32 inside; while they run, torch.float32 stands for torch.float64. Each file written holds the arguments of one of
our ops (arg.*), upstream gradients (up.*), the outputs (out.*) and the gradients of the arguments (grad.*).
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from authors_mamba3 import mamba3
from einops import rearrange, repeat
from peers import SEED, Args, Draw, float32_is_float64, install, lift, load
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent


class Oracle(NamedTuple):
    """How a peer computes one of our ops.

    op     the name of our op
    peer   package, file and function
    run    the arguments of our op, by name -> y, and the last state where the peer gives one
    args   our arguments; floating ones are differentiated, but those named in `fixed`
    """

    op: str
    peer: str
    run: Callable[..., tuple[Tensor, ...]]
    args: Args
    fixed: tuple[str, ...] = ()


def linear_oracles(fla: Callable[[str], Any]) -> Iterator[tuple[str, Oracle]]:
    simple, gla, plain, hgrn = (fla(name) for name in ("simple_gla", "gla", "linear_attn", "hgrn"))
    ours = "linear_recurrence"

    def recurrent(q, k, v, log_decay, state):
        return simple.naive_recurrent_simple_gla(q, k, v, log_decay, 1.0, state, True)

    def chunk(q, k, v, log_decay, state):
        return simple.naive_chunk_simple_gla(q, k, v, log_decay, state, True, 16, 1.0)

    def channels(q, k, v, log_decay, state):  # it multiplies q by key^-½
        return gla.naive_recurrent_gla(q * q.shape[-1] ** 0.5, k, v, log_decay, state, True)

    def undecayed(q, k, v, state):
        return plain.naive_recurrent_linear_attn(q, k, v, 1.0, state, True)

    def constant(q, k, v, log_decay):  # its decays are those of the paper
        q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q * q.shape[-1] ** 0.5, k, v))
        return (rearrange(fla("retention").naive_retention(q, k, v), "b h t d -> b t h d"),)

    def elementwise(q, k, v, log_decay, state):
        y, last = hgrn.naive_recurrent_hgrn(v[..., 0], log_decay, state[..., 0, 0], True)
        return y[..., None], last[..., None, None]

    for name, run in (("simple_gla_recurrent", recurrent), ("simple_gla_chunk", chunk)):
        yield name, Oracle(ours, f"fla-core fla/ops/simple_gla/naive.py naive_{name[11:]}_simple_gla", run,
                           Draw(name).linear(2))  # fmt: skip
    yield "gla", Oracle(ours, "fla-core fla/ops/gla/naive.py naive_recurrent_gla", channels, Draw("gla").linear(2, 4))
    peer = "fla-core fla/ops/linear_attn/naive.py naive_recurrent_linear_attn"
    yield "linear_attention", Oracle(ours, peer, undecayed, Draw("linear_attention").linear())
    args = Draw("retention").linear() | {"log_decay": torch.log1p(-(2.0 ** -(5 + torch.arange(2.0).double())))}
    del args["state"]
    peer = "fla-core fla/ops/retention/naive.py naive_retention"
    yield "retention", Oracle(ours, peer, constant, args, ("log_decay",))
    args = Draw("hgrn").linear(5, key=1, value=1, heads=5)
    args |= {name: torch.ones_like(args[name]) for name in "qk"}
    peer = "fla-core fla/ops/hgrn/naive.py naive_recurrent_hgrn"
    yield "hgrn", Oracle(ours, peer, elementwise, args, ("q", "k"))


def delta_oracles(fla: Callable[[str], Any]) -> Iterator[tuple[str, Oracle]]:
    gated, plain, kda = (fla(name) for name in ("gated_delta_rule", "delta_rule", "kda"))

    def gated_recurrent(q, k, v, beta, log_decay, state):
        return gated.naive_recurrent_gated_delta_rule(q, k, v, beta, log_decay, 1.0, state, True)

    def gated_chunk(q, k, v, beta, log_decay, state):
        return gated.naive_chunk_gated_delta_rule(q, k, v, log_decay, beta, 16, 1.0, state, True)

    def heads_first(q, k, v, beta):  # they multiply q by key^-½
        parts = (rearrange(x, "b t h d -> b h t d") for x in (q * q.shape[-1] ** 0.5, k, v))
        return *parts, rearrange(beta, "b t h -> b h t")

    def recurrent(q, k, v, beta, state):
        y, last = plain.delta_rule_recurrence(*heads_first(q, k, v, beta), state)
        return rearrange(y, "b h t d -> b t h d"), last

    def chunk(q, k, v, beta):
        y, last = plain.delta_rule_chunkwise(*heads_first(q, k, v, beta), 16)
        return rearrange(y, "b h t d -> b t h d"), last

    def kda_recurrent(q, k, v, beta, log_decay, state):
        return kda.naive_recurrent_kda(q, k, v, log_decay, beta, 1.0, state, True)

    def kda_chunk(q, k, v, beta, log_decay, state):
        return kda.naive_chunk_kda(q, k, v, log_decay, beta, 1.0, state, True, 16)

    made = [("gated_delta_recurrent", "gated_delta_rule/naive.py naive_recurrent_gated_delta_rule", gated_recurrent),
            ("gated_delta_chunk", "gated_delta_rule/naive.py naive_chunk_gated_delta_rule", gated_chunk),
            ("delta_recurrent", "delta_rule/naive.py delta_rule_recurrence", recurrent),
            ("delta_chunk", "delta_rule/naive.py delta_rule_chunkwise", chunk),
            ("kda_recurrent", "kda/naive.py naive_recurrent_kda", kda_recurrent),
            ("kda_chunk", "kda/naive.py naive_chunk_kda", kda_chunk)]  # fmt: skip
    for name, peer, run in made:
        draw = Draw(name, time=48 if run in (chunk, kda_chunk) else 37)  # these two pad nothing
        args = draw.delta(*({"g": (2,), "k": (2, 4)}.get(name[0], ())))
        if run is chunk:
            del args["state"]
        yield name, Oracle("delta_rule", f"fla-core fla/ops/{peer}", run, args)


def scan_oracles(folder: Path) -> Iterator[tuple[str, Oracle]]:
    sys.path.insert(0, str(folder))
    from mambapy.pscan import pscan

    known = {"torch": torch, "F": F, "rearrange": rearrange, "repeat": repeat}
    scan = lift(folder / "mamba_ssm/ops/selective_scan_interface.py", known, "selective_scan_ref")[0]
    ssd = lift(folder / "mamba_ssm/modules/ssd_minimal.py", known, "segsum", "ssd_minimal_discrete")[1]

    def selective(x, delta, A, B, C, D, z, delta_bias):
        x, delta, B, C, z = (rearrange(part, "b t d -> b d t") for part in (x, delta, B, C, z))
        y, last = scan(x, delta, A, B, C, D, z, delta_bias, True, True)
        return rearrange(y, "b d t -> b t d"), last

    def parallel(x, delta, A, B, C):
        states = pscan((delta[..., None] * A).exp(), (delta * x)[..., None] * B[..., None, :])
        return (states @ C[..., None])[..., 0], states[:, -1]

    def dual(q, k, v, log_decay, state):
        y, last = ssd(v, log_decay, k, q, 16, rearrange(state, "b h k v -> b 1 h v k"))
        return y, rearrange(last, "b h v k -> b h k v")

    draw = Draw("selective_scan")
    args = {"x": draw.tokens(5), "delta": draw.tokens(5), "A": -draw.normal(5, 3).exp()}
    args |= {"B": draw.tokens(3), "C": draw.tokens(3)}
    peer = "mambapy mambapy/pscan.py pscan"
    yield "pscan", Oracle("selective_scan", peer, parallel, args | {"delta": F.softplus(args["delta"])})
    args |= {"D": draw.normal(5), "z": draw.tokens(5), "delta_bias": draw.normal(5)}
    peer = "mamba-ssm mamba_ssm/ops/selective_scan_interface.py selective_scan_ref"
    yield "selective_scan", Oracle("selective_scan", peer, selective, args)
    peer = "mamba-ssm mamba_ssm/modules/ssd_minimal.py ssd_minimal_discrete"
    yield "ssd_minimal", Oracle("linear_recurrence", peer, dual, Draw("ssd_minimal", time=48).linear(2))


def evaluate(name: str, oracle: Oracle) -> Args:
    leaves = {n: x.clone().requires_grad_(n not in oracle.fixed) for n, x in oracle.args.items()}
    outs = dict(zip(("y", "state"), oracle.run(**leaves), strict=False))
    draw = Draw(f"upstream of {name}")
    ups = {n: draw.normal(*out.shape) for n, out in outs.items()}
    moving = {n: leaf for n, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(list(outs.values()), list(moving.values()), list(ups.values()))
    groups = {"arg": leaves, "up": ups, "out": outs, "grad": dict(zip(moving, grads, strict=True))}
    return {f"{group}.{n}": x for group, tensors in groups.items() for n, x in tensors.items()}


def save(name: str, tensors: Args, about: dict[str, str], folder: Path) -> None:
    assert all(x.dtype == torch.float64 and x.isfinite().all() for x in tensors.values()), name
    versions = {d.name.replace("_", "-"): d.version for d in distributions(path=[str(folder)])}
    package = about["peer"].split()[0]
    about |= {"version": versions[package], "torch": torch.__version__, "seed": str(SEED)}
    path = HERE / f"{name}.safetensors"
    # one entry, because safetensors writes several in no fixed order
    save_file({n: x.detach().contiguous().clone() for n, x in tensors.items()}, path, {"about": json.dumps(about)})
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, {about['peer']} {about['version']}")


def main() -> None:
    with tempfile.TemporaryDirectory() as name, float32_is_float64():
        folder = Path(name)
        install(folder)
        fla = lambda op: load(folder / f"fla/ops/{op}/naive.py")  # noqa: E731
        for oracles in (linear_oracles(fla), delta_oracles(fla), scan_oracles(folder)):
            for name, oracle in oracles:
                save(name, evaluate(name, oracle), {"op": oracle.op, "peer": oracle.peer}, folder)
        for name, output_norm in (("mamba3", False), ("mamba3_output_norm", True)):
            save(name, *mamba3(folder, output_norm), folder)


if __name__ == "__main__":
    main()
