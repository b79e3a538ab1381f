"""The mixture-of-experts layer alone, forward and backward, beside a dense layer of equal active parameters.

Tiny by default; `HYBRIDLAB_SIZES=real` times a size that people train.
"""

import os

import pytest
import torch

from hybridlab.kernels.op import VARIABLE
from hybridlab.models.ffn.gated import SwiGLU
from hybridlab.models.ffn.moe import MoE

SIZES = {
    "tiny": dict(rows=2, time=16, d_model=16, d_hidden=16, n_experts=4, top_k=2),
    "real": dict(rows=8, time=512, d_model=256, d_hidden=256, n_experts=8, top_k=2),
}
VERSIONS = ["dense", "torch", "by_expert"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_moe_speed(version, dtype, benchmark, monkeypatch):
    size = SIZES[os.environ.get("HYBRIDLAB_SIZES", "tiny")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden, slots = size["d_hidden"], size["top_k"]
    if version == "dense":
        layer = SwiGLU(size["d_model"], d_hidden=hidden * slots)
    else:
        monkeypatch.setenv(VARIABLE, f"grouped_matmul={version}")
        layer = MoE(size["d_model"], n_experts=size["n_experts"], top_k=slots, d_hidden=hidden)
    layer = layer.to(device, dtype)
    x = torch.randn(size["rows"], size["time"], size["d_model"], device=device, dtype=dtype, requires_grad=True)

    def step():
        y, extras = layer(x)
        (y.sum() + sum(extras.losses.values())).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(step)
    flops = 3 * layer.flops(size["rows"] * size["time"])
    if benchmark.stats:
        benchmark.extra_info["GFLOP/s"] = flops / benchmark.stats.stats.median / 1e9
