"""Mamba: a selective state space per channel (Gu & Dao 2023, "Mamba")."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from hybridlab.kernels.selective_scan import selective_scan
from hybridlab.models.mixers.recurrent import ConvState, RecurrentMixer, Zeros, fill_dt_bias
from hybridlab.models.parts.conv import ShortConv
from hybridlab.models.parts.norm import RMSNorm
from hybridlab.packing import Packing


class Mamba(RecurrentMixer):
    """Each channel carries `d_state` numbers that decay and absorb input by a step size Δ read off the input itself.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t,  y_t = C_t · h_t + D x_t  (sections 3.2 and 3.4; A real, section 3.6).

    expand     channels per d_model
    norms      normalise what Δ, B and C are read from, as Jamba does to keep large models stable

    Δ is read through a bottleneck of d_model / 16. The memory is [batch, channels, d_state].
    """

    def __init__(self, d_model: int, *, d_state: int = 16, expand: int = 2, d_conv: int = 4, norms: bool = False):
        super().__init__()
        channels = expand * d_model
        self.d_model, self.channels, self.d_state = d_model, channels, d_state
        self.widths = [math.ceil(d_model / 16), d_state, d_state]  # Δ, B, C
        self.inputs = nn.Linear(d_model, 2 * channels, bias=False)  # x, z
        self.conv = ShortConv(channels, width=d_conv, bias=True)
        self.select = nn.Linear(channels, sum(self.widths), bias=False)
        self.norms = nn.ModuleList(RMSNorm(n) for n in self.widths) if norms else None
        self.dt = nn.Linear(self.widths[0], channels, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(channels))
        self.A_log = nn.Parameter(torch.empty(channels, d_state))
        self.D = nn.Parameter(torch.empty(channels))
        self.out = nn.Linear(channels, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        bound = self.dt.in_features**-0.5
        nn.init.uniform_(self.dt.weight, -bound, bound)
        fill_dt_bias(self.dt_bias)
        self.A_log.copy_(torch.arange(1, self.d_state + 1, device=self.A_log.device).log())
        nn.init.ones_(self.D)

    def scan(self, x: Tensor, state: ConvState | None, packing: Packing | None) -> tuple[Tensor, ConvState]:
        conv, ssm = state or (None, None)
        x, z = rearrange(self.inputs(x), "b t (two d) -> two b t d", two=2)
        x, conv = self.conv(x, conv, packing)
        selected = self.select(x).split(self.widths, -1)
        if self.norms is not None:
            selected = [norm(part) for norm, part in zip(self.norms, selected, strict=True)]
        dt, B, C = selected
        A, offsets = -self.A_log.exp(), packing and packing.offsets
        y, ssm = selective_scan(
            x, self.dt(dt), A, B, C, self.D, ssm, offsets, z=z, delta_bias=self.dt_bias, softplus=True
        )
        return self.out(y), ConvState(conv, ssm)

    def empty(self, zeros: Zeros) -> ConvState:
        return ConvState(zeros(self.conv.width - 1, self.conv.dim), zeros(self.channels, self.d_state))

    def flops_beside(self) -> int:
        """7 per number of the state: Δ A, decay, B (Δ x), readout; then D and gate."""
        return 7 * self.channels * self.d_state + 4 * self.channels
