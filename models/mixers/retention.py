"""Retention: linear attention with a fixed decay per head (Sun et al. 2023, "Retentive Network")."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.models.mixers.recurrent import RecurrentMixer, Zeros, divide
from hybridlab.models.parts.norm import RMSNorm
from hybridlab.models.parts.rope import check_dims, positions, rotate
from hybridlab.packing import Packing


class RetentionState(NamedTuple):
    kv: Tensor  # [batch, heads, key, value], float32 or wider
    length: Tensor  # int64 [batch], tokens seen


class Retention(RecurrentMixer):
    """Each head keeps a matrix that shrinks by γ per token and absorbs one outer product k v.

    S_t = γ S_{t-1} + k_t v_tᵀ,  y_t = S_tᵀ q_t with rotated q and k (section 2.1); γ = 1 - 2^(-5 - head), a norm per
    head and a swish gate (section 2.2, eq. 8).

    value_ratio   value channels per key channel; 2 in section 3.1
    """

    log_decay: Tensor  # [heads], not trained

    def __init__(self, d_model: int, *, n_heads: int, value_ratio: int = 2, rope_theta: float = 10000.0):
        super().__init__()
        self.d_model, self.n_heads, self.rope_theta = d_model, n_heads, rope_theta
        self.key_dim = divide(d_model, n_heads, "d_model", "n_heads")
        self.values = value_ratio * d_model
        check_dims(None, self.key_dim)
        self.widths = [d_model, d_model, self.values, self.values]  # q, k, v, gate
        self.inputs = nn.Linear(d_model, sum(self.widths), bias=False)
        self.norm = RMSNorm(value_ratio * self.key_dim)
        self.out = nn.Linear(self.values, d_model, bias=False)
        self.register_buffer("log_decay", torch.empty(n_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        heads = torch.arange(self.n_heads, device=self.log_decay.device)
        self.log_decay.copy_(torch.log1p(-(2.0 ** (-5.0 - heads))))

    def scan(self, x: Tensor, state: RetentionState | None, packing: Packing | None) -> tuple[Tensor, RetentionState]:
        kv, length = state or (None, None)
        parts = self.inputs(x).split(self.widths, -1)
        q, k, v, gate = (rearrange(part, "b t (h d) -> b t h d", h=self.n_heads) for part in parts)
        where = positions(x, length, packing)
        q, k = (rotate(part, where, theta=self.rope_theta) for part in (q, k * self.key_dim**-0.5))
        y, kv = linear_recurrence(q, k, v, self.log_decay, kv, packing and packing.offsets)
        y = self.out(rearrange(self.norm(y) * F.silu(gate), "b t h v -> b t (h v)"))
        seen = x.shape[1] if packing is None else packing.offsets.diff()
        return y, RetentionState(kv, seen + (kv.new_zeros(len(kv), dtype=torch.int64) if length is None else length))

    def empty(self, zeros: Zeros) -> RetentionState:
        return RetentionState(zeros(self.n_heads, self.key_dim, self.norm.dim), zeros().long())

    def flops_beside(self) -> int:
        """5 per number of the state: decay, outer product, readout; then the gate."""
        return 5 * self.values * self.key_dim + self.values
