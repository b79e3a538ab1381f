"""Mamba-2: a state space with one scalar decay per head (Dao & Gu 2024, "Transformers are SSMs")."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.models.mixer import wide
from hybridlab.models.mixers.recurrent import ConvState, RecurrentMixer, Zeros, divide, fill_dt_bias
from hybridlab.models.parts.conv import ShortConv
from hybridlab.packing import Packing


class Mamba2(RecurrentMixer):
    """Each head keeps a matrix that decays by a factor read off the token and absorbs one outer product B x.

    S_t = exp(Δ_t A) S_{t-1} + B_t (Δ_t x_t)ᵀ,  y_t = S_tᵀ C_t + D x_t  (sections 6 and 7.1).
    One projection makes gate, x, B, C and Δ; x, B and C pass a short convolution; the gated output is normalised.

    expand     channels per d_model; they are cut into heads of head_dim
    n_groups   heads share B and C within a group; the output is normalised within a group

    The memory is [batch, heads, d_state, head_dim].
    """

    def __init__(
        self, d_model: int, *, head_dim: int = 64, d_state: int = 128, n_groups: int = 1,
        expand: int = 2, d_conv: int = 4,
    ):  # fmt: skip
        super().__init__()
        self.d_model, self.channels = d_model, expand * d_model
        self.head_dim, self.d_state, self.n_groups = head_dim, d_state, n_groups
        self.n_heads = divide(self.channels, head_dim, "expand · d_model", "head_dim")
        divide(self.n_heads, n_groups, "heads", "n_groups")
        self.bc = n_groups * d_state
        self.widths = [self.channels, self.channels + 2 * self.bc, self.n_heads]  # gate; x, B and C; Δ
        self.inputs = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv = ShortConv(self.channels + 2 * self.bc, width=d_conv, bias=True)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = nn.Parameter(torch.empty(self.channels))
        self.out = nn.Linear(self.channels, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        fill_dt_bias(self.dt_bias)
        nn.init.uniform_(self.A_log, 1, 16).log_()
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm)

    def scan(self, x: Tensor, state: ConvState | None, packing: Packing | None) -> tuple[Tensor, ConvState]:
        conv, ssm = state or (None, None)
        gate, xbc, dt = self.inputs(x).split(self.widths, -1)
        xbc, conv = self.conv(xbc, conv, packing)
        x, B, C = xbc.split([self.channels, self.bc, self.bc], -1)
        x = rearrange(x, "b t (h p) -> b t h p", h=self.n_heads)
        B, C = (rearrange(m, "b t (g n) -> b t g n", g=self.n_groups) for m in (B, C))
        dt = F.softplus(dt.to(wide(dt.dtype)) + self.dt_bias)  # [b, t, h]
        v = (x * dt[..., None]).to(x.dtype)
        y, ssm = linear_recurrence(C, B, v, -dt * self.A_log.exp(), ssm, packing and packing.offsets)
        y = y + x * self.D[:, None]
        y = self._gated_norm(rearrange(y, "b t h p -> b t (h p)"), gate)
        return self.out(y), ConvState(conv, ssm)

    def _gated_norm(self, y: Tensor, gate: Tensor) -> Tensor:
        """rms-normalise y · silu(gate) within each group; both [batch, time, channels]."""
        y = rearrange((y * F.silu(gate)).to(wide(y.dtype)), "b t (g d) -> b t g d", g=self.n_groups)
        y = rearrange(F.rms_norm(y, y.shape[-1:], eps=1e-5), "b t g d -> b t (g d)")
        return (y * self.norm).to(gate.dtype)

    def empty(self, zeros: Zeros) -> ConvState:
        return ConvState(zeros(self.conv.width - 1, self.conv.dim), zeros(self.n_heads, self.d_state, self.head_dim))

    def flops_beside(self) -> int:
        """5 per number of the state: decay, outer product, readout; then Δ, D and gate."""
        return 5 * self.channels * self.d_state + 4 * self.channels
