"""DeltaNet: a memory that corrects what it holds under a key (Schlag et al. 2021; Yang et al. 2024)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridlab.kernels.delta_rule import delta_rule
from hybridlab.models.mixer import wide
from hybridlab.models.mixers.recurrent import ConvState, RecurrentMixer, Zeros, divide
from hybridlab.models.parts.conv import short_conv
from hybridlab.models.parts.norm import RMSNorm, unit
from hybridlab.packing import Packing


class DeltaNet(RecurrentMixer):
    """Each head keeps a matrix that replaces what it holds under the key k by the value v, by the part β.

    S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,  y_t = S_tᵀ q_t  (Yang et al. 2024, section 2.2), with q, k and v
    through a short convolution and SiLU, q and k of unit length, and a norm per head (section 3.3).

    key_dim, value_dim     channels per head; None means d_model / n_heads, and key_dim
    d_conv                 tokens that the convolution sees; None leaves it out and keeps its SiLU
    output_gate            multiply the normalised output by a swish of the input
    negative_eigenvalues   β up to 2 instead of 1, so that a state can change sign (Grazzi et al. 2024)

    The memory is [batch, heads, key_dim, value_dim].
    """

    def __init__(
        self, d_model: int, *, n_heads: int, key_dim: int | None = None, value_dim: int | None = None,
        d_conv: int | None = 4, output_gate: bool = False, negative_eigenvalues: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.d_model, self.n_heads, self.negative_eigenvalues = d_model, n_heads, negative_eigenvalues
        self.key_dim = divide(d_model, n_heads, "d_model", "n_heads") if key_dim is None else key_dim
        self.value_dim = self.key_dim if value_dim is None else value_dim
        self.keys, self.values = n_heads * self.key_dim, n_heads * self.value_dim
        self.gates = self.values if output_gate else 0
        self.inputs = nn.Linear(d_model, 2 * self.keys + self.values + n_heads + self.gates, bias=False)
        self.conv = short_conv(2 * self.keys + self.values, d_conv)
        self.norm = RMSNorm(self.value_dim)
        self.out = nn.Linear(self.values, d_model, bias=False)
        self.reset_parameters()

    def scan(self, x: Tensor, state: ConvState | None, packing: Packing | None) -> tuple[Tensor, ConvState]:
        conv, kv = state or (None, None)
        qkv, beta, gate = self.inputs(x).split([self.conv.dim, self.n_heads, self.gates], -1)
        qkv, conv = self.conv(qkv, conv, packing)
        parts = qkv.split([self.keys, self.keys, self.values], -1)
        q, k, v = (rearrange(part, "b t (h d) -> b t h d", h=self.n_heads) for part in parts)
        q, k = unit(q) * self.key_dim**-0.5, unit(k)
        beta = torch.sigmoid(beta.to(wide(beta.dtype))) * (2 if self.negative_eigenvalues else 1)
        y, kv = delta_rule(q, k, v, beta, None, kv, packing and packing.offsets)
        y = rearrange(self.norm(y), "b t h v -> b t (h v)")
        return self.out(y * F.silu(gate) if self.gates else y), ConvState(conv, kv)

    def empty(self, zeros: Zeros) -> ConvState:
        kv = zeros(self.n_heads, self.key_dim, self.value_dim)
        return ConvState(zeros(self.conv.width - 1, self.conv.dim), kv)

    def flops_beside(self) -> int:
        """6 per number of the state: recall, correction, readout; then the gate."""
        return 6 * self.keys * self.value_dim + self.gates
