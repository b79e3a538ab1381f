"""Gated DeltaNet: a memory that forgets by a gate and corrects itself by the delta rule (Yang et al. 2024)."""

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


class GatedDelta(RecurrentMixer):
    """Each head keeps a matrix that decays, then replaces what it holds under the key k by the value v, in part.

    S_t = (I - β_t k_t k_tᵀ) α_t S_{t-1} + β_t k_t v_tᵀ,  y_t = S_tᵀ q_t  (section 3.1, eq. 10), with α as in Mamba-2,
    q, k and v through a short convolution, q and k of unit length, and a gated norm per head (section 3.3).

    n_heads, n_value_heads   heads of q and k; of v, a multiple of it that shares them in groups (None: as many)
    key_dim, value_dim       channels per head; None means d_model / n_heads, and key_dim
    d_conv                   tokens that the convolution sees; None leaves it out and keeps its SiLU
    negative_eigenvalues     β up to 2 instead of 1, so that a state can change sign (Grazzi et al. 2024)

    The memory is [batch, value heads, key_dim, value_dim].
    """

    def __init__(
        self, d_model: int, *, n_heads: int, n_value_heads: int | None = None, key_dim: int | None = None,
        value_dim: int | None = None, d_conv: int | None = 4, negative_eigenvalues: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.d_model, self.n_heads, self.negative_eigenvalues = d_model, n_heads, negative_eigenvalues
        self.key_dim = divide(d_model, n_heads, "d_model", "n_heads") if key_dim is None else key_dim
        self.value_dim = self.key_dim if value_dim is None else value_dim
        self.n_value_heads = n_heads if n_value_heads is None else n_value_heads
        divide(self.n_value_heads, n_heads, "n_value_heads", "n_heads")
        self.keys, self.values = n_heads * self.key_dim, self.n_value_heads * self.value_dim
        # q, k and v; gate; β; α
        self.widths = [2 * self.keys + self.values, self.values, self.n_value_heads, self.n_value_heads]
        self.inputs = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv = short_conv(2 * self.keys + self.values, d_conv)
        self.dt_bias = nn.Parameter(torch.empty(self.n_value_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_value_heads))
        self.norm = RMSNorm(self.value_dim)
        self.out = nn.Linear(self.values, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        fill_dt_bias(self.dt_bias)
        nn.init.uniform_(self.A_log, 1, 16).log_()

    def scan(self, x: Tensor, state: ConvState | None, packing: Packing | None) -> tuple[Tensor, ConvState]:
        conv, kv = state or (None, None)
        qkv, gate, beta, dt = self.inputs(x).split(self.widths, -1)
        qkv, conv = self.conv(qkv, conv, packing)
        q, k, v = qkv.split([self.keys, self.keys, self.values], -1)
        q, k = (rearrange(part, "b t (g k) -> b t g k", g=self.n_heads) for part in (q, k))
        v, gate = (rearrange(part, "b t (h v) -> b t h v", h=self.n_value_heads) for part in (v, gate))
        acc = wide(dt.dtype)
        q, k = unit(q) * self.key_dim**-0.5, unit(k)
        beta = torch.sigmoid(beta.to(acc)) * (2 if self.negative_eigenvalues else 1)
        log_decay = -self.A_log.exp() * F.softplus(dt.to(acc) + self.dt_bias)
        y, kv = delta_rule(q, k, v, beta, log_decay, kv, packing and packing.offsets)
        y = rearrange(self.norm(y) * F.silu(gate), "b t h v -> b t (h v)")
        return self.out(y), ConvState(conv, kv)

    def empty(self, zeros: Zeros) -> ConvState:
        kv = zeros(self.n_value_heads, self.key_dim, self.value_dim)
        return ConvState(zeros(self.conv.width - 1, self.conv.dim), kv)

    def flops_beside(self) -> int:
        """7 per number of the state: decay, recall, correction, readout; then the gate."""
        return 7 * self.values * self.key_dim + self.values
