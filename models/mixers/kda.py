"""Kimi Delta Attention: Gated DeltaNet with a decay per key channel (Kimi Team 2025, "Kimi Linear")."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridlab.kernels.delta_rule import delta_rule
from hybridlab.models.mixer import wide
from hybridlab.models.mixers.recurrent import ConvState, RecurrentMixer, Zeros, divide, fill_dt_bias
from hybridlab.models.parts.conv import short_conv
from hybridlab.models.parts.norm import RMSNorm, unit
from hybridlab.packing import Packing


class KDA(RecurrentMixer):
    """Each head keeps a matrix whose rows fade one by one, then replaces what it holds under the key k, in part.

    S_t = (I - β_t k_t k_tᵀ) diag(α_t) S_{t-1} + β_t k_t v_tᵀ,  y_t = S_tᵀ q_t  (section 3, eq. 1), with
    log α = -exp(A) softplus(x W₁ W₂ + b); q, k and v through a short convolution, q and k of unit length, and a norm
    per head, gated by a sigmoid that is read through a bottleneck (section 4).

    key_dim, value_dim     channels per head; None means d_model / n_heads, and key_dim
    d_conv                 tokens that the convolution sees; None leaves it out and keeps its SiLU
    gate_rank              width of the two bottlenecks; None means value_dim
    negative_eigenvalues   β up to 2 instead of 1, so that a state can change sign (Grazzi et al. 2024)
    decay_bound            log α = decay_bound · sigmoid(exp(A) (x W₁ W₂ + b)), never below this bound; -5 in Kimi K3

    The memory is [batch, heads, key_dim, value_dim].
    """

    def __init__(
        self, d_model: int, *, n_heads: int, key_dim: int | None = None, value_dim: int | None = None,
        d_conv: int | None = 4, gate_rank: int | None = None, negative_eigenvalues: bool = False,
        decay_bound: float | None = None,
    ):  # fmt: skip
        super().__init__()
        if decay_bound is not None and decay_bound >= 0:
            raise ValueError(f"decay_bound={decay_bound} must be negative, or None")
        self.d_model, self.n_heads, self.decay_bound = d_model, n_heads, decay_bound
        self.negative_eigenvalues = negative_eigenvalues
        self.key_dim = divide(d_model, n_heads, "d_model", "n_heads") if key_dim is None else key_dim
        self.value_dim = self.key_dim if value_dim is None else value_dim
        self.keys, self.values = n_heads * self.key_dim, n_heads * self.value_dim
        rank = self.value_dim if gate_rank is None else gate_rank
        self.widths = [2 * self.keys + self.values, n_heads, rank, rank]  # q, k and v; β; α; gate
        self.inputs = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv = short_conv(2 * self.keys + self.values, d_conv)
        self.forget, self.gate = (nn.Linear(rank, n, bias=False) for n in (self.keys, self.values))
        self.dt_bias = nn.Parameter(torch.empty(self.keys))
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.norm = RMSNorm(self.value_dim)
        self.out = nn.Linear(self.values, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        fill_dt_bias(self.dt_bias)
        if self.decay_bound is None:
            nn.init.uniform_(self.A_log, 1, 16).log_()
        else:
            nn.init.zeros_(self.A_log)

    def scan(self, x: Tensor, state: ConvState | None, packing: Packing | None) -> tuple[Tensor, ConvState]:
        conv, kv = state or (None, None)
        qkv, beta, forget, gate = self.inputs(x).split(self.widths, -1)
        qkv, conv = self.conv(qkv, conv, packing)
        parts = (*qkv.split([self.keys, self.keys, self.values], -1), self.gate(gate))
        q, k, v, gate = (rearrange(part, "b t (h d) -> b t h d", h=self.n_heads) for part in parts)
        q, k = unit(q) * self.key_dim**-0.5, unit(k)
        beta = torch.sigmoid(beta.to(wide(beta.dtype))) * (2 if self.negative_eigenvalues else 1)
        y, kv = delta_rule(q, k, v, beta, self._log_decay(forget), kv, packing and packing.offsets)
        y = rearrange(self.norm(y) * torch.sigmoid(gate), "b t h v -> b t (h v)")
        return self.out(y), ConvState(conv, kv)

    def _log_decay(self, low: Tensor) -> Tensor:
        """low [batch, time, rank] -> [batch, time, heads, key], float32 or wider."""
        step = self.forget(low)
        step = rearrange(step.to(wide(step.dtype)) + self.dt_bias, "b t (h k) -> b t h k", h=self.n_heads)
        rate = self.A_log.exp()[:, None]
        return -rate * F.softplus(step) if self.decay_bound is None else self.decay_bound * torch.sigmoid(rate * step)

    def empty(self, zeros: Zeros) -> ConvState:
        kv = zeros(self.n_heads, self.key_dim, self.value_dim)
        return ConvState(zeros(self.conv.width - 1, self.conv.dim), kv)

    def flops_beside(self) -> int:
        """7 per number of the state: decay, recall, correction, readout; then the gate."""
        return 7 * self.keys * self.value_dim + self.values
