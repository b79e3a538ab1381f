"""The laws of feed-forward layers, as a base class: a class of tests with a method `make` checks a layer of yours."""

from abc import abstractmethod

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hybridlab.kernels.op import VARIABLE
from hybridlab.kernels.ops import OPS
from hybridlab.models.ffn.base import NOTHING, Extras, FeedForward
from hybridlab.models.ffn.moe import Experts
from hybridlab.models.ffn.router import Router
from hybridlab.testing.laws import ModuleLaws, distance

DEFINITIONS = ",".join(f"{op.name}=reference" for op in OPS)


class FfnLaws(ModuleLaws):
    """Subclass as `class TestMine(FfnLaws)` and define `make`. Layers that hold a `Router` answer for routing too."""

    @abstractmethod
    def make(self) -> FeedForward:
        """A small feed-forward layer."""

    def fresh(self) -> FeedForward:
        return self.make()

    def definition(self, ffn: FeedForward, x: Tensor) -> Tensor:
        """x [tokens, d_model] -> y: each token alone; override with the formula of the layer."""
        return torch.cat([ffn(x_t)[0] for x_t in x.split(1)])

    def build(self, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[FeedForward, Tensor]:
        """The same layer and input [*shape, d_model] at every call, but for rounding to `dtype`."""
        torch.manual_seed(0)
        ffn = self.make().to(dtype)
        return ffn, torch.randn(*shape, ffn.d_model).to(dtype).requires_grad_()

    @pytest.mark.parametrize("kernels", [DEFINITIONS, ""], ids=["definition", "auto"])
    def test_a_token_sees_no_other(self, kernels: str, monkeypatch: pytest.MonkeyPatch):
        """Bitwise; but the size of an expert's group may round its products differently, unless by the definition."""
        monkeypatch.setenv(VARIABLE, kernels)
        ffn, x = self.build(2, 7, dtype=torch.float32)
        others = torch.arange(14).view(2, 7) != 3
        (a, a_to), (b, b_to) = (_observe(ffn, v) for v in (x, torch.where(others[..., None], x, 1 - 2 * x)))
        assert torch.equal(a_to[others], b_to[others]), "the routing of other tokens changed"
        bitwise = kernels or not a_to.shape[-1]
        assert torch.equal(a[others], b[others]) if bitwise else distance(a[others], b[others]) < 2e-6

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_values_and_gradients_equal_the_definition(self, dtype: torch.dtype):
        """Within twice the definition's own error in `dtype`, or 16 eps: two products of some 60 terms each."""
        ours, plain = self._gradients(lambda ffn, x: ffn(x)[0], dtype), self._gradients(self.definition, dtype)
        for name, truth in self._gradients(self.definition, torch.float64).items():
            budget = max(2 * distance(plain[name], truth), 16 * torch.finfo(dtype).eps)
            assert distance(ours[name], truth) <= budget, name

    def _gradients(self, fn, dtype: torch.dtype) -> dict[str, Tensor]:
        ffn, x = self.build(11, dtype=dtype)
        y, wanted = fn(ffn, x), {"x": x, **dict(ffn.named_parameters())}
        upstream = torch.arange(y.numel(), dtype=torch.float64).cos().view(y.mT.shape).mT.to(dtype)
        grads = torch.autograd.grad(y, list(wanted.values()), upstream, materialize_grads=True)
        return {"y": y, **dict(zip(wanted, grads, strict=True))}

    def test_flops_are_those_of_the_matrix_products(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv(VARIABLE, DEFINITIONS)
        ffn, x = self.build(1, 13)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            ffn(x.detach())
        assert ffn.flops(13) == 13 * ffn.flops(1) == counter.get_total_flops()

    def test_routing_stays_wide_where_all_else_is_bfloat16(self):
        _observe(*self.build(2, 5, dtype=torch.bfloat16))

    @pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (1,), (4,)])
    def test_any_number_of_tokens_is_served_and_idle_experts_get_no_gradient(self, shape: tuple[int, ...]):
        ffn, x = self.build(*shape, dtype=torch.float32)
        y, extras = ffn(x)
        (y.sum() + sum(extras.losses.values())).backward()
        assert y.shape == x.shape and x.grad is not None and all(t.isfinite().all() for t in extras.losses.values())
        for grad in (p.grad for m in ffn.modules() if isinstance(m, Experts) for p in m.parameters()):
            assert grad is not None and torch.equal(grad.flatten(1).any(1), extras.stats["load"] > 0)

    def test_extras_are_empty_when_dense_and_add_up_over_rows_when_routed(self):
        ffn, x = self.build(4, 9)
        (_, whole), (_, one), (_, rest) = (ffn(rows) for rows in (x, x[:1], x[1:]))
        routing = [p for m in ffn.modules() if isinstance(m, Router) for p in m.parameters()]
        assert routing or whole == NOTHING
        losses = {name: one.losses[name] / 4 + rest.losses[name] * 3 / 4 for name in whole.losses}
        stats = {name: one.stats[name] + rest.stats[name] for name in whole.stats}
        torch.testing.assert_close(whole, Extras(losses, stats), rtol=1e-12, atol=0)
        assert all(g.any() for loss in losses.values() for g in torch.autograd.grad(loss, routing, retain_graph=True))
        assert not any(stat.requires_grad for stat in whole.stats.values())

    def test_checkpointing_and_evaluation_count_nothing_twice(self):
        ffn, x = self.build(2, 5)
        before = [repr(vars(m)) for m in ffn.modules()]
        y, extras = checkpoint(ffn, x, use_reentrant=False)
        y.sum().backward()
        for stats in (ffn(x)[1].stats, ffn.eval()(x)[1].stats):
            torch.testing.assert_close(stats, extras.stats, rtol=0, atol=0)
        assert before == [repr(vars(m)) for m in ffn.train().modules()], "something is stashed on a module"


def _observe(ffn: FeedForward, x: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the experts chosen, int64 [..., slots of all routers]; checks that routing is computed wide."""
    seen: list = []
    for router in (m for m in ffn.modules() if isinstance(m, Router)):
        router.register_forward_hook(lambda module, args, routing: seen.append(routing))
    y = ffn(x)[0].detach()
    assert y.dtype == x.dtype and all(t.dtype.itemsize >= 4 for r in seen for t in (r.weights, r.logits)), (
        "routing must be float32 or wider"
    )
    chosen = [r.experts for r in seen] or [torch.zeros(x[..., 0].numel(), 0)]
    return y, torch.cat(chosen, 1).unflatten(0, x.shape[:-1])
