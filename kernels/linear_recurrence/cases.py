import torch
from torch import Tensor

from hybridlab.kernels import check as must
from hybridlab.kernels.draw import Draw
from hybridlab.kernels.op import Case

SIZES = dict(batch=4, heads=8, groups=2, key=8, value=16, decay="time", docs=None, state=True)
CASES: dict[str, Case] = {
    "tiny": SIZES | dict(time=5),
    "single": SIZES | dict(time=1, heads=9, groups=3, key=5, value=7),
    "irregular": SIZES | dict(time=83, heads=9, groups=3, key=5, value=7),
    "packed": SIZES | dict(batch=1, time=83, docs=(20, 0, 1, 62, 0)),
    "single channels": SIZES | dict(time=1, decay="channel"),
    "single undecayed": SIZES | dict(time=1, decay=None, state=False),
    "constant": SIZES | dict(time=70, decay="head"),
    "undecayed": SIZES | dict(time=70, groups=1, decay=None, state=False),
    "channels": SIZES | dict(batch=1, time=83, decay="channel", docs=(0, 33, 50)),
    "resets": SIZES | dict(time=83, low=-0.05, resets=5),
    "long": SIZES | dict(batch=1, time=1000, groups=1),
    "real": SIZES | dict(batch=8, time=512, heads=8, groups=1, key=64, value=64),
}


def make(case: Case, draw: Draw) -> dict:
    b, t, h, g, k, v = (case[name] for name in ("batch", "time", "heads", "groups", "key", "value"))
    shape = {"head": (h,), "time": (b, t, h), "channel": (b, t, h, k)}.get(case["decay"])
    log_decay = draw.log_decay(*shape, low=case.get("low", -1.0)) if shape else None
    if log_decay is not None and "resets" in case:  # every so many steps, all is forgotten
        log_decay[:, :: case["resets"]] = -100.0
    return dict(
        q=draw.normal(b, t, g, k, scale=k**-0.5),
        k=draw.normal(b, t, g, k),
        v=draw.normal(b, t, h, v),
        log_decay=log_decay,
        state=draw.normal(len(case["docs"] or range(b)), h, k, v) if case["state"] else None,
        offsets=draw.offsets(case["docs"]),
    )


def check(q: Tensor, k: Tensor, v: Tensor, log_decay=None, state=None, offsets=None) -> None:
    axes = {1: "h", 3: "b t h"}.get(log_decay.dim(), "b t h k") if log_decay is not None else ""
    sizes = must.shapes({"q": (q, "b t g k"), "k": (k, "b t g k"), "v": (v, "b t h v"), "log_decay": (log_decay, axes)})
    if sizes["h"] % sizes["g"]:
        raise ValueError(f"{sizes['g']} groups of q and k do not divide {sizes['h']} heads of v")
    must.state(state, "h k v", sizes, offsets)
    must.within("log_decay", log_decay, -torch.inf, 0)


def flops(case: Case) -> int:
    per_head = case["key"] * case["value"]
    return (4 + (case["decay"] is not None)) * case["batch"] * case["time"] * case["heads"] * per_head
