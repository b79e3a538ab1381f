"""Mixture of experts: each token passes through a few of many feed-forward layers. No token is dropped."""

from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from hybridlab.kernels.grouped_matmul import grouped_matmul
from hybridlab.models.ffn.base import Extras, FeedForward
from hybridlab.models.ffn.gated import DENSE
from hybridlab.models.ffn.router import Router, Routing, SoftmaxTopK


class Experts(nn.Module):
    """Stacked dense layers. They are matrices, so they are cast with the model, unlike what a `Module` owns."""

    def __init__(self, d_model: int, *, n_experts: int, d_hidden: int, activation: str):
        super().__init__()
        self.act = DENSE[activation].act
        self.up = nn.Parameter(torch.empty(n_experts, d_model, DENSE[activation].branches * d_hidden))
        self.down = nn.Parameter(torch.empty(n_experts, d_hidden, d_model))

    def reset_parameters(self) -> None:
        for weight in (self.up, self.down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [rows, d_model] sorted by expert, offsets int [experts + 1] -> like x; under autocast, in its dtype."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        x, up, down = (t.to(dtype or t.dtype) for t in (x, self.up, self.down))
        return grouped_matmul(self.act(grouped_matmul(x, up, offsets)[0]), down, offsets)[0]


class MoE(FeedForward):
    """y = Σ_i weight_i · expert_i(x) over the experts the router chooses, summed in slot order, plus a shared layer.

    x is [..., time, d_model]; a decode step [batch, d_model] is one row of `batch` tokens.

    router         (d_model, n_experts=…, top_k=…) -> Router; softmax top-k if None
    d_shared       hidden size of the shared layer; 0 for none
    activation     swiglu, geglu or relu2
    balance_loss   coefficient of n_experts / top_k · Σ_e f_e P_e, f_e the share of a row's tokens that chose e, P_e its
                   mean probability (arXiv 2412.19437, eq. 17); a mean over rows, so it adds up over micro-batches
    z_loss         coefficient of the mean over tokens of logsumexp(logits)² (arXiv 2202.08906, eq. 5)

    Losses: balance, router_z. Stats, sums over tokens: load int64 [experts], tokens int64, entropy.
    """

    def __init__(
        self, d_model: int, *, n_experts: int, top_k: int, d_hidden: int, d_shared: int = 0,
        router: Callable[..., Router] | None = None, activation: Literal["swiglu", "geglu", "relu2"] = "swiglu",
        balance_loss: float = 0.01, z_loss: float = 0.001,
    ):  # fmt: skip
        super().__init__()
        if activation not in DENSE:
            raise ValueError(f"activation={activation!r} is not one of {sorted(DENSE)}")
        if d_hidden < 1 or min(d_shared, balance_loss, z_loss) < 0:
            raise ValueError(f"{d_hidden=} must be positive; {d_shared=}, {balance_loss=} and {z_loss=} not negative")
        self.d_model, self.top_k = d_model, top_k
        self.coefficients = {"balance": balance_loss, "router_z": z_loss}
        self.router = (router or SoftmaxTopK)(d_model, n_experts=n_experts, top_k=top_k)
        self.experts = Experts(d_model, n_experts=n_experts, d_hidden=d_hidden, activation=activation)
        self.shared = DENSE[activation](d_model, d_hidden=d_shared) if d_shared else None
        self.reset_parameters()

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Extras]:
        routing = self.router(x.flatten(0, -2), None if tokens is None else tokens.flatten())
        chosen, order = routing.experts.flatten().sort(stable=True)
        offsets = torch.searchsorted(chosen, torch.arange(len(self.experts.up) + 1, device=x.device))
        # one row per token and slot: both selections are permutations, so no gradient depends on an order of summation
        xs = repeat(x.flatten(0, -2), "n d -> (n k) d", k=self.top_k).index_select(0, order)
        ys = rearrange(self.experts(xs, offsets).index_select(0, order.argsort()), "(n k) d -> n k d", k=self.top_k)
        y = (ys * routing.weights[..., None]).sum(1).to(ys.dtype).unflatten(0, x.shape[:-1])
        y = y if self.shared is None else y + self.shared(x)[0]
        stats = {"load": offsets.diff(), "tokens": offsets.new_full((), len(ys))}
        stats["entropy"] = torch.special.entr(routing.probs.detach()).sum()
        return y, Extras(self._losses(routing, x.shape[:-1]), stats)

    def _losses(self, routing: Routing, shape: torch.Size) -> dict[str, Tensor]:
        """Weighted losses of tokens [..., time]; 0 without tokens, and left out where the coefficient is 0."""
        picks = torch.zeros_like(routing.probs).scatter(1, routing.experts, routing.probs.shape[1] / self.top_k)
        share, prob = (t.unflatten(0, shape).sum(-2) / max(shape[-1], 1) for t in (picks, routing.probs))
        terms = {"balance": (share * prob).sum(-1), "router_z": routing.logits.logsumexp(-1).square()}
        return {name: c * terms[name].sum() / max(terms[name].numel(), 1) for name, c in self.coefficients.items() if c}

    def flops(self, length: int) -> int:
        return 2 * self.active_params() * length  # every parameter is an element of a matrix

    def output_weights(self) -> list[Tensor]:
        return [self.experts.down] + ([] if self.shared is None else self.shared.output_weights())

    def active_params(self) -> int:
        idle = len(self.experts.up) - self.top_k
        return super().active_params() - idle * sum(w[0].numel() for w in self.experts.parameters())
