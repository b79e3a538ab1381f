from torch import Tensor

from hybridlab.kernels import check as must
from hybridlab.kernels.draw import Draw
from hybridlab.kernels.op import Case

SIZES = dict(batch=2, width=4, docs=None, state=True, bias=True, silu=True)
CASES: dict[str, Case] = {
    "tiny": SIZES | dict(time=5, d_model=8),
    "short": SIZES | dict(time=2, d_model=3, width=6, bias=False, silu=False),
    "single": SIZES | dict(time=1, d_model=13),
    "irregular": SIZES | dict(time=63, d_model=13, width=3, state=False),
    "packed": SIZES | dict(batch=1, time=63, d_model=13, docs=(20, 0, 1, 42, 0)),
    "long": SIZES | dict(batch=1, time=1000, d_model=64),
    "real": SIZES | dict(batch=8, time=512, d_model=640),
}


def make(case: Case, draw: Draw) -> dict:
    b, t, d, w = (case[name] for name in ("batch", "time", "d_model", "width"))
    return dict(
        x=draw.normal(b, t, d),
        weight=draw.normal(d, w, scale=w**-0.5),
        bias=draw.normal(d) if case["bias"] else None,
        state=draw.normal(len(case["docs"] or range(b)), w - 1, d) if case["state"] else None,
        offsets=draw.offsets(case["docs"]),
        silu=case["silu"],
    )


def check(x: Tensor, weight: Tensor, bias=None, state=None, offsets=None, *, silu: bool = False) -> None:
    sizes = must.shapes({"x": (x, "b t d"), "weight": (weight, "d w"), "bias": (bias, "d")})
    must.state(state, "w-1 d", sizes | {"w-1": sizes["w"] - 1}, offsets)


def flops(case: Case) -> int:
    return 2 * case["width"] * case["batch"] * case["time"] * case["d_model"]


def no_matmul(case: Case) -> int:
    """In plain torch each tap is a product element by element: a matmul executes none of it."""
    return 0
