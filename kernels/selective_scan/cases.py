import torch

from hybridlab.kernels import check as must
from hybridlab.kernels.draw import Draw
from hybridlab.kernels.op import Case

SIZES = dict(batch=2, n=4, docs=None, state=True, rest=True)  # rest: skip, gate, bias and softplus
CASES: dict[str, Case] = {
    "tiny": SIZES | dict(time=5, d_model=24),
    "single": SIZES | dict(time=1, d_model=24),
    "irregular": SIZES | dict(time=83, d_model=24, n=3, rest=False, state=False),
    "packed": SIZES | dict(batch=1, time=83, d_model=24, docs=(20, 0, 1, 62, 0)),
    "long": SIZES | dict(batch=1, time=1000, d_model=16),
    "real": SIZES | dict(batch=8, time=512, d_model=512, n=16),
}


def make(case: Case, draw: Draw) -> dict:
    b, t, d, n, rest = (case[name] for name in ("batch", "time", "d_model", "n", "rest"))
    return dict(
        x=draw.normal(b, t, d),
        delta=draw.normal(b, t, d) if rest else draw.uniform(b, t, d, low=0.001, high=case.get("most", 0.5)),
        A=draw.uniform(d, n, low=-n, high=-0.05),
        B=draw.normal(b, t, n),
        C=draw.normal(b, t, n, scale=n**-0.5),
        D=draw.normal(d) if rest else None,
        state=draw.normal(len(case["docs"] or range(b)), d, n) if case["state"] else None,
        offsets=draw.offsets(case["docs"]),
        z=draw.normal(b, t, d) if rest else None,
        delta_bias=draw.uniform(d, low=-5.0, high=-1.0) if rest else None,
        softplus=rest,
    )


def check(x, delta, A, B, C, D=None, state=None, offsets=None, *, z=None, delta_bias=None, softplus=False) -> None:
    sizes = must.shapes(
        {"x": (x, "b t d"), "delta": (delta, "b t d"), "A": (A, "d n"), "B": (B, "b t n"), "C": (C, "b t n")}
        | {"D": (D, "d"), "z": (z, "b t d"), "delta_bias": (delta_bias, "d")}
    )
    must.state(state, "d n", sizes, offsets)
    must.within("A", A, -torch.inf, 0)
    if not softplus:
        must.within("delta", delta if delta_bias is None else delta + delta_bias, 0, torch.inf)


def refuses_triton(x, delta, A, B, C, D=None, state=None, offsets=None, *, z=None, delta_bias=None, softplus=False):
    """It computes in float32, and loops over blocks of states."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {x.dtype}; it computes in float32, and takes float32, bfloat16 or float16"
    return f"{A.shape[1]} states per channel; it takes at most 256" if A.shape[1] > 256 else None


def flops(case: Case) -> int:
    """Per channel and state: Δ·A, decay · h, + (Δx)·B, h·C; exponentials, the skip and the gate are not counted."""
    return 6 * case["batch"] * case["time"] * case["d_model"] * case["n"]
