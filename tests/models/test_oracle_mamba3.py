"""Mamba-3 against the authors' layer, stepped token by token in float64 by their own torch code (`make oracles`)."""

from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file

from hybridlab.models.mixers.mamba3 import Mamba3
from hybridlab.testing.laws import distance

FOLDER = Path(__file__).parent.parent / "oracles"
TOLERANCE = 1e-10


def halves(x, at=-1):
    """The authors turn channels 2i and 2i + 1 of the first half together, we turn i and i + a quarter."""
    pairs = torch.arange(x.shape[at] // 2)
    return x.index_select(at, torch.cat([pairs[0::2], pairs[1::2], pairs + len(pairs)]))


def ours_from(theirs, d_state):
    """Parameters of Mamba3 by our names, or their gradients: everything but the channels of B and C is in one order."""
    rows = theirs["in_proj.weight"].clone()
    inner = theirs["out_proj.weight"].shape[1]
    for start in (2 * inner, 2 * inner + d_state):  # after gate and x
        rows[start : start + d_state] = halves(rows[start : start + d_state], 0)
    named = {"inputs.weight": rows, "out.weight": theirs["out_proj.weight"], "dt_bias": theirs["dt_bias"]}
    named |= {"norms.0.weight": halves(theirs["B_norm.weight"]), "norms.1.weight": halves(theirs["C_norm.weight"])}
    named |= {"bias": halves(torch.stack([theirs["B_bias"], theirs["C_bias"]])[:, :, 0]), "D": theirs["D"]}
    if "norm.weight" in theirs:
        named["norm"] = rearrange(theirs["norm.weight"], "(h p) -> h p", h=len(theirs["D"]))
    return named


@pytest.mark.parametrize("name", ["mamba3", "mamba3_output_norm"])
def test_mamba3_is_the_authors(name):
    data = load_file(FOLDER / f"{name}.safetensors")
    weights, grads = (
        {n.removeprefix(p): x for n, x in data.items() if n.startswith(p)} for p in ("layer.", "grad.")
    )  # fmt: skip
    mixer = Mamba3(8, head_dim=4, d_state=8, output_norm="norm" in name).double()
    mixer.load_state_dict(ours_from(weights, 8))
    x = data["x"].requires_grad_()
    y = mixer(x)
    assert distance(y, data["y"]) <= TOLERANCE
    named = dict(mixer.named_parameters())
    got = torch.autograd.grad(y, [x, *named.values()], data["up"])
    want = {"x": grads.pop("x")} | ours_from(grads, 8)
    for name, grad in zip(["x", *named], got, strict=True):
        assert distance(grad, want[name]) <= TOLERANCE, f"d{name}"
