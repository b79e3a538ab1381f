"""Training cost per token as the context grows: our transformer, our 3:1 hybrid and a pure Mamba-2 of equal parameters;
and the memory that a selective scan keeps for its backward, ours and transformers'.

    python context.py [--threads 2]
"""

import argparse
import resource
import statistics
import subprocess
import sys

import peers
import torch
from torch import nn

from hybridlab.models.block import Block
from hybridlab.models.ffn.gated import SwiGLU
from hybridlab.models.lm import HybridLM
from hybridlab.models.mixers.attention import Attention
from hybridlab.models.mixers.mamba2 import Mamba2
from hybridlab.training.device import keep_memory
from train import VOCAB, D, stepper

LENGTHS = (512, 1024, 2048, 4096, 8192)


def model(pattern: list[str]) -> nn.Module:
    """Feed-forwards are sized so that both kinds of layer hold about as many parameters."""
    blocks = {
        "attn": lambda d: Block(d, mixer=lambda d: Attention(d, n_heads=4), ffn=lambda d: SwiGLU(d, d_hidden=688)),
        "ssm": lambda d: Block(d, mixer=lambda d: Mamba2(d, d_state=64), ffn=lambda d: SwiGLU(d, d_hidden=472)),
    }
    used = {name: blocks[name] for name in set(pattern)}
    return HybridLM(vocab_size=VOCAB, d_model=D, pattern=pattern, n_layers=4, blocks=used)


def growth() -> None:
    models = {"transformer": model(["attn"]), "hybrid": model(["ssm"] * 3 + ["attn"]), "mamba2": model(["ssm"])}
    print({name: sum(p.numel() for p in m.parameters()) for name, m in models.items()})
    for time in LENGTHS:
        steps = {name: stepper(m, 8192 // time, False, time) for name, m in models.items()}
        for step in steps.values():
            step()
        rounds = [{name: peers.seconds(step) for name, step in steps.items()} for _ in range(3)]
        medians = {name: 1e6 / 8192 * statistics.median(r[name] for r in rounds) for name in models}
        ratio = statistics.median(r["transformer"] / r["hybrid"] for r in rounds)
        said = ", ".join(f"{name} {value:.0f}" for name, value in medians.items())
        print(f"T{time}: us per token {said}; transformer / hybrid {ratio:.2f}", flush=True)


def memory(whose: str) -> None:
    """Growth of the process over a forward pass that keeps what its backward needs, B1 T2048 D1536 N16."""
    from ops import scan_args

    from hybridlab.kernels.selective_scan import selective_scan

    small, args = scan_args(1, 64, 16, 16), scan_args(1, 2048, 1536, 16)

    def run(args):
        x, delta, A, B, C, D, bias, z = args
        if whose == "ours":
            return selective_scan(x, delta, A, B, C, D, z=z, delta_bias=bias, softplus=True)
        return peers.mamba_scan(*args, use_mambapy=False)

    run(small)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = run(args)
    print(f"{whose}: {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f} MiB", len(kept))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", choices=["ours", "transformers"])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.memory:
        memory(asked.memory)
    else:
        print(peers.versions())
        for whose in ("ours", "transformers"):
            subprocess.run([sys.executable, __file__, "--memory", whose], check=True)
        keep_memory()
        torch.manual_seed(0)
        growth()
