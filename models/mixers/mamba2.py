"""Mamba-2: a state space with one scalar decay per head (Dao & Gu 2024, "Transformers are SSMs")."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.kernels.linear_recurrence.step import advance
from hybridlab.models.mixer import wide
from hybridlab.models.mixers.recurrent import ConvState, RecurrentMixer, Zeros, divide, fill_dt_bias
from hybridlab.models.parts.conv import ShortConv
from hybridlab.packing import Packing

Norm = Literal["after_gate", "before_gate", "none"]


class Mamba2(RecurrentMixer):
    """Each head keeps a matrix that decays by a factor read off the token and absorbs one outer product B x.

    S_t = exp(Δ_t A) S_{t-1} + B_t (Δ_t x_t)ᵀ,  y_t = S_tᵀ C_t + D x_t  (sections 6 and 7.1).
    One projection makes gate, x, B, C and Δ; x, B and C pass a short convolution; the gated output is normalised.
    The options are those in which published hybrids differ.

    n_groups   heads share B and C within a group; the output is normalised within a group
    expand     channels per d_model, cut into heads of head_dim; 2 where neither it nor n_heads is given
    n_heads    heads, in place of expand, where they do not make up a multiple of d_model (Falcon-H1, Nemotron Nano)
    norm       of the output after the gate, before it, or none (both Falcon-H1)
    dt_min     Δ does not fall below it (Zamba2 and Nemotron-H, in transformers)

    The memory is [batch, heads, d_state, head_dim].
    """

    def __init__(
        self, d_model: int, *, head_dim: int = 64, d_state: int = 128, n_groups: int = 1, expand: int | None = None,
        n_heads: int | None = None, d_conv: int = 4, norm: Norm = "after_gate", dt_min: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        if expand is not None and n_heads is not None:
            raise ValueError(f"expand={expand} and n_heads={n_heads} both give the channels; give one of them")
        if norm not in get_args(Norm):
            raise ValueError(f"norm={norm!r} is not one of {get_args(Norm)}")
        if dt_min < 0 or (n_heads is not None and n_heads < 1):
            raise ValueError(f"dt_min={dt_min} must be at least 0, and n_heads={n_heads} at least 1, or None")
        self.d_model, self.norm_order, self.dt_min = d_model, norm, dt_min
        self.channels = (2 if expand is None else expand) * d_model if n_heads is None else n_heads * head_dim
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
        self.norm = None if norm == "none" else nn.Parameter(torch.empty(self.channels))
        self.out = nn.Linear(self.channels, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        fill_dt_bias(self.dt_bias)
        nn.init.uniform_(self.A_log, 1, 16).log_()
        nn.init.ones_(self.D)
        if self.norm is not None:
            nn.init.ones_(self.norm)

    def scan(self, x: Tensor, state: ConvState | None, packing: Packing | None) -> tuple[Tensor, ConvState]:
        conv, ssm = state or (None, None)
        gate, xbc, dt = self.inputs(x).split(self.widths, -1)
        xbc, conv = self.conv(xbc, conv, packing)
        x, C, B, v, log_decay = self._read(xbc, dt)
        y, ssm = linear_recurrence(C, B, v, log_decay, ssm, packing and packing.offsets)
        return self._write(y, x, gate), ConvState(conv, ssm)

    def step(self, x: Tensor, state: ConvState) -> tuple[Tensor, ConvState]:
        gate, xbc, dt = self.inputs(x).split(self.widths, -1)
        xbc, conv = self.conv.step(xbc, state.conv)
        x, C, B, v, log_decay = self._read(xbc, dt)
        y, ssm = advance(C, B, v, log_decay, state.memory)
        return self._write(y, x, gate), ConvState(conv, ssm)

    def _read(self, xbc: Tensor, dt: Tensor) -> tuple[Tensor, ...]:
        """x by heads, and what the recurrence takes: C, B, Δ x, Δ A; axes before the last as in xbc and dt."""
        x, B, C = xbc.split([self.channels, self.bc, self.bc], -1)
        x = x.unflatten(-1, (self.n_heads, self.head_dim))  # [..., h, p]
        B, C = (m.unflatten(-1, (self.n_groups, self.d_state)) for m in (B, C))  # [..., g, n]
        dt = F.softplus(dt.to(wide(dt.dtype)) + self.dt_bias)  # [..., h]
        dt = dt.clamp(min=self.dt_min) if self.dt_min else dt
        return x, C, B, (x * dt[..., None]).to(x.dtype), -dt * self.A_log.exp()

    def _write(self, y: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """y and x [..., heads, head_dim], gate [..., channels] -> [..., d_model]."""
        y = (y + x * self.D[:, None]).flatten(-2)
        y, gate = y.to(wide(y.dtype)), F.silu(gate)
        if self.norm is not None:  # within each group, in the order asked for
            y = y * gate if self.norm_order == "after_gate" else y
            grouped = y.unflatten(-1, (self.n_groups, -1))
            y = F.rms_norm(grouped, grouped.shape[-1:], eps=1e-5).flatten(-2) * self.norm
        return self.out((y if self.norm_order == "after_gate" else y * gate).to(gate.dtype))

    def empty(self, zeros: Zeros) -> ConvState:
        return ConvState(zeros(self.conv.width - 1, self.conv.dim), zeros(self.n_heads, self.d_state, self.head_dim))

    def flops_beside(self) -> int:
        """5 per number of the state: decay, outer product, readout; then Δ, D and gate."""
        return 5 * self.channels * self.d_state + 4 * self.channels
