"""Gated linear attention: a decay per key channel, read off the token (Yang et al. 2023)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.models.mixer import wide
from hybridlab.models.mixers.recurrent import RecurrentMixer, Zeros, divide
from hybridlab.models.parts.norm import RMSNorm
from hybridlab.packing import Packing


class GLAState(NamedTuple):
    kv: Tensor  # [batch, heads, key, value], float32 or wider


class GLA(RecurrentMixer):
    """Each head keeps a matrix whose rows fade by factors read off the token, and absorbs one outer product k v.

    S_t = diag(α_t) S_{t-1} + k_t v_tᵀ,  y_t = S_tᵀ q_t,  α = sigmoid(x W₁ W₂ + b)^(1/16)  (sections 4.1 and 4.4),
    with a norm per head and a swish gate (section 4.4).

    key_dim, value_dim   channels per head; None means half of value_dim, rounded up, and d_model / n_heads
    gate_rank            width of the bottleneck that α is read through
    """

    def __init__(
        self, d_model: int, *, n_heads: int, key_dim: int | None = None, value_dim: int | None = None,
        gate_rank: int = 16,
    ):  # fmt: skip
        super().__init__()
        self.d_model, self.n_heads = d_model, n_heads
        self.value_dim = divide(d_model, n_heads, "d_model", "n_heads") if value_dim is None else value_dim
        self.key_dim = -(-self.value_dim // 2) if key_dim is None else key_dim
        self.keys, self.values = n_heads * self.key_dim, n_heads * self.value_dim
        self.widths = [self.keys, self.keys, self.values, self.values, gate_rank]  # q, k, v, gate, α
        self.inputs = nn.Linear(d_model, sum(self.widths), bias=False)
        self.forget = nn.Linear(gate_rank, self.keys, bias=False)
        self.decay_bias = nn.Parameter(torch.empty(self.keys))
        self.norm = RMSNorm(self.value_dim)
        self.out = nn.Linear(self.values, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.decay_bias)

    def scan(self, x: Tensor, state: GLAState | None, packing: Packing | None) -> tuple[Tensor, GLAState]:
        *parts, low = self.inputs(x).split(self.widths, -1)
        forget = self.forget(low)
        log_decay = F.logsigmoid(forget.to(wide(forget.dtype)) + self.decay_bias) / 16  # most α start near 1
        q, k, v, gate, log_decay = (rearrange(p, "b t (h d) -> b t h d", h=self.n_heads) for p in (*parts, log_decay))
        q = q * self.key_dim**-0.5
        y, kv = linear_recurrence(q, k, v, log_decay, state and state.kv, packing and packing.offsets)
        return self.out(rearrange(self.norm(y) * F.silu(gate), "b t h v -> b t (h v)")), GLAState(kv)

    def empty(self, zeros: Zeros) -> GLAState:
        return GLAState(zeros(self.n_heads, self.key_dim, self.value_dim))

    def flops_beside(self) -> int:
        """5 per number of the state: decay, outer product, readout; then the gate."""
        return 5 * self.keys * self.value_dim + self.values
