from torch import Tensor

from hybridlab.kernels import check as must
from hybridlab.kernels.draw import Draw
from hybridlab.kernels.linear_recurrence import cases as linear
from hybridlab.kernels.op import Case

TIMES = ("tiny", "single", "single channels", "single undecayed", "irregular", "packed", "channels", "resets", "long")
CASES: dict[str, Case] = {name: linear.CASES[name] for name in TIMES} | {
    "ungated": linear.CASES["undecayed"],
    "real": linear.CASES["real"] | dict(groups=8),
}


def make(case: Case, draw: Draw) -> dict:
    args = linear.make(case, draw)
    beta = draw.uniform(*args["v"].shape[:3], high=case.get("most", 1.0))
    return args | dict(k=draw.unit(*args["k"].shape), beta=beta)


def check(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay=None, state=None, offsets=None) -> None:
    linear.check(q, k, v, log_decay, state, offsets)
    must.shapes({"v": (v, "b t h v"), "beta": (beta, "b t h")})
    must.within("beta", beta, 0, 2)
    if log_decay is not None and log_decay.dim() == 1:
        raise ValueError(f"log_decay has shape {list(log_decay.shape)}, but must be [b t h] or [b t h k]")


def flops(case: Case) -> int:
    """One more product with the state than `linear_recurrence`: what is stored under the key."""
    return linear.flops(case) + 2 * case["batch"] * case["time"] * case["heads"] * case["key"] * case["value"]
