"""Routing and losses of mixture-of-experts, number by number; and that a router keeps its experts in use."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hybridlab.kernels.grouped_matmul import grouped_matmul
from hybridlab.models.ffn.moe import MoE
from hybridlab.models.ffn.router import SoftmaxTopK

D, E = 16, 4


def moe(**options) -> MoE:
    torch.manual_seed(0)
    return MoE(D, **(dict(n_experts=E, top_k=2, d_hidden=8) | options))


def test_equal_logits_choose_the_lowest_index():
    router = SoftmaxTopK(D, n_experts=40, top_k=3)
    torch.nn.init.zeros_(router.weight)
    routing = router(torch.randn(5, D))
    assert routing.experts.tolist() == [[0, 1, 2]] * 5
    torch.nn.init.constant_(router.weight[:, 7], 1.0)
    assert router(torch.ones(1, D)).experts.tolist() == [[7, 0, 1]]


def test_losses_are_those_of_the_formulas():
    layer, x = moe(balance_loss=0.3, z_loss=0.7).double(), torch.randn(3, 10, D, dtype=torch.float64)
    rows, squares = [], []
    for row in x:
        chosen, prob = [0.0] * E, [0.0] * E
        for x_t in row:
            logits = (x_t @ layer.router.weight).tolist()
            total = sum(math.exp(v) for v in logits)
            squares.append(math.log(total) ** 2)
            prob = [p + math.exp(v) / total / len(row) for p, v in zip(prob, logits, strict=True)]
            for e in sorted(range(E), key=lambda e: -logits[e])[:2]:
                chosen[e] += 1 / len(row)
        rows.append(E / 2 * sum(f * p for f, p in zip(chosen, prob, strict=True)))
    losses = layer(x)[1].losses
    assert losses["balance"].item() == pytest.approx(0.3 * sum(rows) / len(rows), rel=1e-12)
    assert losses["router_z"].item() == pytest.approx(0.7 * sum(squares) / len(squares), rel=1e-12)


def test_balance_loss_is_its_coefficient_when_balanced_and_experts_over_top_k_when_collapsed():
    layer = moe(n_experts=D, top_k=1, balance_loss=1.0)
    layer.router.weight.data = 200 * torch.eye(D)
    assert layer(torch.eye(D)[None])[1].losses["balance"].item() == pytest.approx(1)
    assert layer(torch.eye(D)[None, :1].expand(1, 8, D))[1].losses["balance"].item() == pytest.approx(D)


def test_gradients_of_micro_batches_of_rows_add_up_to_those_of_the_batch():
    x = torch.randn(5, 7, D)
    whole, parts = moe(d_shared=8).double(), moe(d_shared=8).double()
    for layer, batches in ((whole, [x]), (parts, x.split([1, 3, 1]))):
        for rows in batches:
            y, extras = layer(rows.double())
            (y.square().sum() / x.numel() + sum(extras.losses.values()) * len(rows) / len(x)).backward()
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15, msg=name)


def test_statistics_count_every_token_once():
    stats = moe()(torch.randn(3, 10, D))[1].stats
    assert stats["load"].sum().item() == 60 and stats["tokens"].item() == 30 and stats["load"].dtype == torch.int64
    assert 0.9 * math.log(E) < stats["entropy"].item() / 30 <= math.log(E)


def test_single_steps_choose_and_compute_as_the_whole_row_does():
    layer, x = moe(), torch.randn(40, D)
    experts = torch.cat([layer.router(x_t).experts for x_t in x.split(1)])
    assert torch.equal(experts, layer.router(x).experts)
    torch.testing.assert_close(torch.cat([layer(x_t)[0] for x_t in x.split(1)]), layer(x[None])[0][0])


def test_a_permutation_of_tokens_permutes_the_output_and_nothing_else():
    layer, x, order = moe().double(), torch.randn(1, 30, D, dtype=torch.float64), torch.randperm(30)
    torch.testing.assert_close(layer(x[:, order])[0], layer(x)[0][:, order], rtol=1e-13, atol=1e-14)


def test_routing_ignores_autocast_and_experts_obey_it():
    layer, x = moe(d_shared=8), torch.randn(2, 9, D)
    exact, plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, extras = layer(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(torch.equal(v, plain.stats[k]) for k, v in extras.stats.items())
    assert all(torch.equal(v, plain.losses[k]) for k, v in extras.losses.items())
    assert 1e-4 < ((y - exact).norm() / exact.norm()).item() < 2e-2
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_checkpointing_under_autocast_recomputes_the_same_routing():
    layer, x = moe(), torch.randn(2, 9, D, requires_grad=True)
    grads = []
    for again in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            y, extras = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
            loss = y.float().square().sum() + sum(extras.losses.values())
        grads.append(torch.autograd.grad(loss, [x, *layer.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_active_parameters_and_flops_count_the_chosen_experts_only():
    layer = moe(n_experts=8, top_k=3, d_shared=5)
    router, expert, shared = D * 8, 3 * D * 8, 3 * D * 5
    assert sum(p.numel() for p in layer.parameters()) == router + 8 * expert + shared
    assert layer.active_params() == router + 3 * expert + shared
    assert layer.flops(7) == 7 * 2 * layer.active_params()


@pytest.mark.long
def test_compiling_gives_the_same_result():
    layer, x = moe(), torch.randn(2, 9, D)
    results = []
    for fn in (layer, torch.compile(layer, backend="aot_eager")):
        layer.zero_grad()
        y, extras = fn(x)
        (y.sum() + sum(extras.losses.values())).backward()
        results.append([y, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(top_k=5), "top_k=5 must be from 1 to n_experts=4"),
        (dict(top_k=0), "top_k=0"),
        (dict(activation="swish"), "activation='swish' is not one of"),
        (dict(z_loss=-1.0), "z_loss=-1.0"),
        (dict(d_hidden=0), "d_hidden=0 must be positive"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        moe(**options)
    with pytest.raises(ValueError, match="makes every weight 1"):
        SoftmaxTopK(D, n_experts=4, top_k=1, renormalise=True)


def test_the_grouped_product_refuses_what_it_cannot_serve():
    x, weight, offsets = torch.randn(5, 8), torch.randn(2, 8, 4), torch.tensor([0, 2, 5])
    refusals = [(x.double(), weight.double()), (x[:, :7], weight[:, :7]), (x.half(), weight.half()), (x[:0], weight)]
    for args in refusals:
        ends = offsets.clamp_max(len(args[0]))
        assert grouped_matmul.unavailable("torch", *args, ends)
        assert grouped_matmul(*args, ends)[0].shape == (len(args[0]), 4)
    for ends in ([0, 2, 4], [0, 2, 6], [1, 2, 5], [0, 6, 5], [0, 5]):
        with pytest.raises(ValueError, match="offsets"):
            grouped_matmul(x, weight, torch.tensor(ends))
    with pytest.raises(RuntimeError, match="offsets must end"):
        grouped_matmul.get("torch")(x, weight, torch.tensor([0, 2, 4]))


@pytest.mark.parametrize("version", ["torch", "by_expert", "reference"])
def test_the_gradient_of_a_sum_reaches_the_grouped_product(version):
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, 4, requires_grad=True)
    grouped_matmul(x, weight, torch.tensor([0, 2, 2, 5]), version=version)[0].sum().backward()
    torch.testing.assert_close(x.grad[3], weight[2].detach().sum(1))
    assert not weight.grad[1].any()


@pytest.mark.parametrize("collapsed", [False, True], ids=["fresh", "collapsed"])
def test_a_router_keeps_all_experts_in_use(collapsed):
    """300 steps of fitting a map that differs by cluster; the collapsed start sends every token to experts 0 and 1."""
    layer = moe(n_experts=8, top_k=2, d_hidden=16, balance_loss=0.05)
    centres, maps = torch.randn(8, D), torch.randn(8, D, D) / 4
    if collapsed:
        centres += 1
        layer.router.weight.data[:, :2] += 0.5
    load = torch.zeros(8)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(300):
        cluster = torch.randint(8, (4, 32))
        x = centres[cluster] + 0.3 * torch.randn(4, 32, D)
        target = torch.einsum("b t d, b t d f -> b t f", x, maps[cluster])
        y, extras = layer(x)
        load += extras.stats["load"] if step >= 250 else 0
        if step == 0:
            assert collapsed == ((extras.stats["load"] == 0).sum() > 3)
        loss = (y - target).square().mean() + sum(extras.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = extras.stats["entropy"] / extras.stats["tokens"]
    assert load.max() / load.mean() <= 2 and load.min() > 0, load
    assert entropy >= 0.9 * math.log(8), entropy
