"""The laws, for every feed-forward layer, against its formula."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlab.models.ffn.gated import GeGLU, SquaredReLU, SwiGLU
from hybridlab.models.ffn.moe import MoE
from hybridlab.models.ffn.router import SoftmaxTopK
from hybridlab.testing.ffn_laws import FfnLaws

D = 16


def swiglu(u: Tensor) -> Tensor:
    half = u.shape[-1] // 2
    gate, value = u[..., :half], u[..., half:]
    return gate / (1 + (-gate).exp()) * value


class TestSwiGLU(FfnLaws):
    def make(self):
        return SwiGLU(D, d_hidden=24)

    def definition(self, ffn, x):
        return swiglu(x @ ffn.up.weight.T) @ ffn.down.weight.T


class TestGeGLU(FfnLaws):
    def make(self):
        return GeGLU(D, d_hidden=24)

    def definition(self, ffn, x):
        gate, value = (x @ ffn.up.weight.T).split(24, -1)
        return (gate * (1 + torch.erf(gate * 2**-0.5)) / 2 * value) @ ffn.down.weight.T


class TestSquaredReLU(FfnLaws):
    def make(self):
        return SquaredReLU(D)

    def definition(self, ffn, x):
        u = x @ ffn.up.weight.T
        return torch.where(u > 0, u * u, 0 * u) @ ffn.down.weight.T


class TestMoE(FfnLaws):
    """Loops over tokens and, for each, over experts by falling logit; top-2 of 5, weights summing to 1."""

    def make(self):
        return MoE(D, n_experts=5, top_k=2, d_hidden=8)

    def weights(self, logits: Tensor, chosen: list[int]) -> Tensor:
        return logits[chosen].exp() / logits[chosen].exp().sum()

    def definition(self, ffn, x):
        ys = []
        for x_t in x:
            logits = x_t @ ffn.router.weight
            chosen = sorted(range(len(logits)), key=lambda e: (-logits[e].item(), e))[: ffn.top_k]
            y = sum(
                w * (ffn.experts.act(x_t @ ffn.experts.up[e]) @ ffn.experts.down[e])
                for w, e in zip(self.weights(logits, chosen), chosen, strict=True)
            )
            ys.append(y if ffn.shared is None else y + ffn.shared(x_t)[0])
        return torch.stack(ys)


class TestSharedExpert(TestMoE):
    """Probabilities among all experts as weights, squared ReLU, and a shared layer."""

    def make(self):
        router = partial(SoftmaxTopK, renormalise=False)
        return MoE(D, n_experts=4, top_k=3, d_hidden=8, router=router, d_shared=12, activation="relu2")

    def weights(self, logits, chosen):
        return F.softmax(logits, 0)[chosen]


class TestTopOneOfOddSizes(TestMoE):
    """Sizes that torch's grouped product refuses, one slot, and no losses."""

    def make(self):
        return MoE(D, n_experts=7, top_k=1, d_hidden=5, activation="geglu", balance_loss=0.0, z_loss=0.0)

    def weights(self, logits, chosen):
        return F.softmax(logits, 0)[chosen]
