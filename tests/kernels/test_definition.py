"""Each definition equals a second formulation, written down independently of the recurrence."""

import pytest
import torch
import torch.nn.functional as F
from einops import einsum, repeat

from hybridlab.kernels.causal_conv import causal_conv
from hybridlab.kernels.delta_rule import delta_rule
from hybridlab.kernels.grouped_matmul import grouped_matmul
from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.kernels.selective_scan import selective_scan


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_causal_conv_is_conv1d_of_the_padded_row(lab):
    args = lab.make(causal_conv, causal_conv.cases["tiny"] | dict(time=9))
    whole = torch.cat([args["state"], args["x"]], 1)
    y = F.conv1d(whole.mT, args["weight"][:, None], args["bias"], groups=whole.shape[2]).mT
    got, state = causal_conv(**args, version="reference")
    same(got, F.silu(y))
    same(state, whole[:, -3:])


@pytest.mark.parametrize("case", ["tiny", "constant", "undecayed", "channels"])
def test_linear_recurrence_is_masked_quadratic_attention(lab, case):
    case = linear_recurrence.cases[case] | dict(time=9, docs=None, state=False, batch=2, heads=4)
    args = lab.make(linear_recurrence, case)
    q, k = (repeat(args[n], "b t g k -> b t (g r) k", r=case["heads"] // args["q"].shape[2]) for n in "qk")
    g = args["log_decay"]
    g = torch.zeros(2, 9, 4, 1).double() if g is None else g.expand(2, 9, 4)[..., None] if g.dim() < 4 else g
    y = torch.zeros_like(args["v"])
    for i in range(9):
        for j in range(i + 1):
            kept = g[:, j + 1 : i + 1].sum(1).exp()
            y[:, i] += (q[:, i] * kept * k[:, j]).sum(-1, keepdim=True) * args["v"][:, j]
    same(linear_recurrence(**args, version="reference")[0], y)


@pytest.mark.parametrize("case", ["tiny", "ungated", "channels"])
def test_delta_rule_is_a_product_of_dense_matrices(lab, case):
    case = delta_rule.cases[case] | dict(time=6, docs=None, state=True, batch=1, heads=2, groups=1, key=3)
    args = lab.make(delta_rule, case)
    g = args["log_decay"]
    g = torch.zeros(1, 6, 2, 1).double() if g is None else g[..., None] if g.dim() < 4 else g
    for h in range(2):
        s = args["state"][0, h]
        for t in range(6):
            k, beta, eye = args["k"][0, t, 0], args["beta"][0, t, h], torch.eye(3).double()
            s = (eye - beta * torch.outer(k, k)) @ torch.diag(g[0, t, h].exp().expand(3)) @ s
            s = s + beta * torch.outer(k, args["v"][0, t, h])
            same(delta_rule(**args, version="reference")[0][0, t, h], s.T @ args["q"][0, t, 0])
        same(delta_rule(**args, version="reference")[1][0, h], s)


def test_delta_rule_with_step_one_replaces_the_value_stored_under_a_key(lab):
    args = lab.make(delta_rule, delta_rule.cases["ungated"] | dict(time=4, groups=4))
    args |= dict(q=args["k"], beta=torch.ones_like(args["beta"]))
    same(delta_rule(**args, version="reference")[0], args["v"])


def test_selective_scan_is_a_sum_over_the_past(lab):
    args = lab.make(selective_scan, selective_scan.cases["tiny"] | dict(time=7))
    x, A, B, C = (args[n] for n in "xABC")
    step = F.softplus(args["delta"] + args["delta_bias"])
    total = step.cumsum(1)
    rows = []
    for i in range(7):
        kept = torch.exp(einsum(total[:, i, None] - total[:, : i + 1], A, "b t d, d n -> b t d n"))
        h = einsum(kept, step[:, : i + 1] * x[:, : i + 1], B[:, : i + 1], "b t d n, b t d, b t n -> b d n")
        h = h + torch.exp(total[:, i, :, None] * A) * args["state"]
        rows.append(einsum(h, C[:, i], "b d n, b n -> b d"))
    got, state = selective_scan(**args, version="reference")
    same(got, (torch.stack(rows, 1) + args["D"] * x) * F.silu(args["z"]))
    same(state, h)


def test_grouped_matmul_is_a_product_with_the_weight_of_each_row(lab):
    args = lab.make(grouped_matmul, grouped_matmul.cases["tiny"])
    owner = torch.repeat_interleave(torch.arange(3), args["offsets"].diff())
    same(grouped_matmul(**args, version="reference")[0], einsum(args["x"], args["weight"][owner], "r k, r k n -> r n"))
