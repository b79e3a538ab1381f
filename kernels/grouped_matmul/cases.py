from torch import Tensor

from hybridlab.kernels import check as must
from hybridlab.kernels.draw import Draw
from hybridlab.kernels.op import Case

CASES: dict[str, Case] = {  # rows: of each expert
    "tiny": dict(rows=(3, 0, 2), k=16, n=8),
    "irregular": dict(rows=(20, 0, 1, 42, 0), k=20, n=33),
    "none": dict(rows=(0, 0), k=8, n=16),
    "long": dict(rows=(1000, 3), k=32, n=16),
    "real": dict(rows=(1024,) * 8, k=256, n=512),
}


def make(case: Case, draw: Draw) -> dict:
    x, weight = draw.normal(sum(case["rows"]), case["k"]), draw.normal(len(case["rows"]), case["k"], case["n"])
    return dict(x=x, weight=weight, offsets=draw.offsets(case["rows"]))


def check(x: Tensor, weight: Tensor, offsets: Tensor) -> None:
    size = must.shapes({"x": (x, "r k"), "weight": (weight, "e k n")})
    must.state(None, "", {"b": 1, "t": size["r"]}, offsets)
    if x.dtype != weight.dtype or len(offsets) != size["e"] + 1:
        given = f"x {x.dtype}, weight {weight.dtype}, {len(offsets)} offsets"
        raise ValueError(f"{given} for {size['e']} experts do not fit")


def flops(case: Case) -> int:
    return 2 * sum(case["rows"]) * case["k"] * case["n"]
