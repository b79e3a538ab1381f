"""Feed-forward layers that break one law each, and the law that says so."""

import pytest
import torch
from torch import nn

from hybridlab.models.ffn.base import Extras
from hybridlab.models.ffn.gated import SwiGLU
from hybridlab.models.ffn.moe import MoE
from hybridlab.models.ffn.router import SoftmaxTopK
from hybridlab.testing.ffn_laws import DEFINITIONS, FfnLaws

D = 16


class Leaks(SwiGLU):
    def forward(self, x, tokens=None):
        return super().forward(x - 1e-6 * x.mean(-2, keepdim=True))


class Miscounts(SwiGLU):
    def flops(self, length):
        return super().flops(length) // 2


class Forgets(SwiGLU):
    def __init__(self, d_model, *, d_hidden):
        super().__init__(d_model, d_hidden=d_hidden)
        self.register_buffer("scale", torch.ones(d_model))

    def forward(self, x, tokens=None):
        return super().forward(x * self.scale.to(x.dtype))


class Narrows(SwiGLU):
    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)

    def __init__(self, d_model, *, d_hidden):
        super().__init__(d_model, d_hidden=d_hidden)
        self.skip = nn.Parameter(torch.zeros(d_model))


class Talks(SwiGLU):
    def forward(self, x, tokens=None):
        return super().forward(x)[0], Extras({}, {"mean": x.mean().detach()})


class Stashes(MoE):
    def forward(self, x, tokens=None):
        y, extras = super().forward(x, tokens)
        self.load = extras.stats["load"]
        return y, extras


class BalancesOverTheBatch(MoE):
    def forward(self, x, tokens=None):
        y, extras = super().forward(x, tokens)
        return y, super().forward(x.flatten(0, -2), tokens)[1]


class NarrowRouter(SoftmaxTopK):
    def forward(self, x, tokens=None):
        return type(routing := super().forward(x))(*(t.to(x.dtype) if t.is_floating_point() else t for t in routing))


class RoutesByNeighbours(SoftmaxTopK):
    def forward(self, x, tokens=None):
        return super().forward(x - 2 * x.mean(0))


class DetachedRouter(SoftmaxTopK):
    def forward(self, x, tokens=None):
        routing = super().forward(x)
        return routing._replace(logits=routing.logits.detach(), probs=routing.probs.detach())


class TouchesIdleExperts(MoE):
    def forward(self, x, tokens=None):
        y, extras = super().forward(x, tokens)
        return y + 1e-9 * self.experts.up.sum() * x, extras


class CountsCalls(MoE):
    def __init__(self, d_model, **options):
        super().__init__(d_model, **options)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, tokens=None):
        y, extras = super().forward(x, tokens)
        self.calls += 1
        return y, Extras(extras.losses, extras.stats | {"calls": self.calls.clone()})


def dense(cls):
    return lambda self: cls(D, d_hidden=24)


def routed(cls=MoE, router=None):
    return lambda self: cls(D, n_experts=5, top_k=2, d_hidden=8, router=router)


BROKEN = {  # law -> layers that break it
    "test_a_token_sees_no_other": [dense(Leaks), routed(router=RoutesByNeighbours)],
    "test_flops_are_those_of_the_matrix_products": [dense(Miscounts)],
    "test_a_module_built_on_meta_comes_to_life": [dense(Forgets)],
    "test_bfloat16_narrows_matrices_and_no_parameter_of_a_module": [dense(Narrows)],
    "test_routing_stays_wide_where_all_else_is_bfloat16": [routed(router=NarrowRouter)],
    "test_extras_are_empty_when_dense_and_add_up_over_rows_when_routed": [
        dense(Talks), routed(BalancesOverTheBatch), routed(router=DetachedRouter),
    ],
    "test_checkpointing_and_evaluation_count_nothing_twice": [routed(Stashes), routed(CountsCalls)],
    "test_any_number_of_tokens_is_served_and_idle_experts_get_no_gradient": [routed(TouchesIdleExperts)],
}  # fmt: skip
ARGUMENTS = {
    "test_a_token_sees_no_other": lambda patch: (DEFINITIONS, patch),
    "test_flops_are_those_of_the_matrix_products": lambda patch: (patch,),
    "test_any_number_of_tokens_is_served_and_idle_experts_get_no_gradient": lambda patch: ((1,),),
}


@pytest.mark.parametrize("law, make", [(law, make) for law, makes in BROKEN.items() for make in makes])
def test_the_law_catches_the_broken_layer(law, make, monkeypatch):
    laws = type("Broken", (FfnLaws,), {"make": make})()
    with pytest.raises((AssertionError, RuntimeError)):
        getattr(laws, law)(*ARGUMENTS.get(law, lambda patch: ())(monkeypatch))


def test_the_definition_catches_a_wrong_formula():
    laws = type("Wrong", (FfnLaws,), {"make": dense(Leaks)})()
    with pytest.raises(AssertionError):
        laws.test_values_and_gradients_equal_the_definition(torch.float64)
