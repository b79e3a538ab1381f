"""Time of every version of every op, forward and with backward; `--sizes=real` for sizes that count."""

import pytest
import torch

from hybridlab.kernels.ops import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = [pytest.param(op, version, id=f"{op.name}-{version}") for op in OPS for version in ("reference", *op.versions)]


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("op, version", RUNS)
def test_speed(timed, sizes, benchmark, op, version, backward):
    case, dtype = op.cases[sizes], torch.bfloat16 if DEVICE == "cuda" else torch.float32
    args = op.make(case, DEVICE, dtype, torch.Generator().manual_seed(0))
    if why := op.unavailable(version, **args):
        pytest.skip(why)
    for x in args.values():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_(backward)
    upstream = [torch.randn_like(o) for o in op(**args, version=version)]

    def run():
        outs = op(**args, version=version)
        if backward:
            torch.autograd.backward(outs, upstream)
        wait()

    benchmark.extra_info |= dict(flops=op.flops(case), bytes=op.bytes(case, dtype), case=str(case), device=DEVICE)
    timed(run)
