"""Mamba-3: a state space with a trapezoidal step and a state that turns (Lahoti et al. 2026, arXiv 2603.15569)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from hybridlab.kernels.causal_conv import causal_conv
from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.models.mixer import wide
from hybridlab.models.mixers.recurrent import RecurrentMixer, Zeros, divide, fill_dt_bias
from hybridlab.models.parts.norm import RMSNorm
from hybridlab.models.parts.rope import check_dims, turn
from hybridlab.packing import Packing


class Mamba3State(NamedTuple):
    """All float32 or wider. `memory` holds every input but the last, which waits for the step size after it."""

    angle: Tensor  # [batch, heads, 1, rope_dims / 2], by how much B and C have turned, from 0 to 2π
    memory: Tensor  # [batch, heads, d_state, head_dim]
    last: Tensor  # [batch, 1, heads · (d_state + head_dim)], B and x
    gain: Tensor  # [batch, 1, heads], γ


class Mamba3(RecurrentMixer):
    """As Mamba-2, with an input rule of second order, rotating states, and neither convolution nor norm at the end.

    S_t = α_t S_{t-1} + β_t B_{t-1} x_{t-1}ᵀ + γ_t B_t x_tᵀ,  y_t = S_tᵀ C_t + D x_t,  then a gate silu(z_t), with
    α = exp(Δ A), β = (1 - λ) Δ α, γ = λ Δ (section 3.1: exponential-trapezoidal); Δ, A < 0 and λ in (0, 1) are read
    off the token, one each per head. B and C are normalised, get a bias per head, and turn by the angle Σ Δ π tanh(θ)
    in pairs of channels, which is a complex state (section 3.2). One input and one output per head (SISO). What the
    section leaves open follows the authors' code, mamba-ssm 2.3.2.

    Computed as H_t = α_t H_{t-1} + B_{t-1} (α_t (γ_{t-1} + (1 - λ_t) Δ_t) x_{t-1})ᵀ, one linear recurrence over the
    inputs one token late, and S_t = H_t + γ_t B_t x_tᵀ: token t reads no step size but its own and those before.
    Angles are summed in float32 within a call: over 8,192 tokens that all turn one way the output loses 4e-5.

    expand       channels per d_model; they are cut into heads of head_dim
    n_groups     heads share B and C, before bias and rotation, within a group
    rope_dims    leading channels of B and C that turn; None means half of d_state
    output_norm  normalise each head's output before the gate, as the authors do between attention layers
    """

    def __init__(
        self, d_model: int, *, head_dim: int = 64, d_state: int = 128, n_groups: int = 1, expand: int = 2,
        rope_dims: int | None = None, output_norm: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.d_model, self.channels = d_model, expand * d_model
        self.head_dim, self.d_state, self.n_groups = head_dim, d_state, n_groups
        self.n_heads = divide(self.channels, head_dim, "expand · d_model", "head_dim")
        divide(self.n_heads, n_groups, "heads", "n_groups")
        self.angles = check_dims(d_state // 4 * 2 if rope_dims is None else rope_dims, d_state) // 2
        if self.angles < 1:
            raise ValueError(f"rope_dims={rope_dims} of d_state={d_state}: at least one pair of channels must turn")
        # gate, x, B and C, Δ, A, λ, θ
        self.widths = [self.channels, self.channels, 2 * n_groups * d_state, *[self.n_heads] * 3, self.angles]
        self.inputs = nn.Linear(d_model, sum(self.widths), bias=False)
        self.norms = nn.ModuleList(RMSNorm(d_state, eps=1e-5) for _ in "BC")
        self.bias = nn.Parameter(torch.empty(2, self.n_heads, d_state))  # of B, of C
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = nn.Parameter(torch.empty(self.n_heads, head_dim)) if output_norm else None
        self.out = nn.Linear(self.channels, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        fill_dt_bias(self.dt_bias)
        for ones in (self.bias, self.D, self.norm):
            if ones is not None:
                nn.init.ones_(ones)

    def scan(self, x: Tensor, state: Mamba3State | None, packing: Packing | None) -> tuple[Tensor, Mamba3State]:
        angle, memory, last, gain = state or (None,) * 4
        offsets, acc = None if packing is None else packing.offsets, wide(x.dtype)
        gate, x, bc, *scalars = self.inputs(x).split(self.widths, -1)
        gate, x = (rearrange(part, "b t (h p) -> b t h p", h=self.n_heads) for part in (gate, x))
        dt, rate, mix, theta = (part.to(acc) for part in scalars)
        dt, mix = F.softplus(dt + self.dt_bias), mix.sigmoid()
        log_decay = -dt * F.softplus(rate).clamp(min=1e-4)  # as the authors bound A away from 0
        speed = dt[..., None] * (math.pi * theta.tanh()).unsqueeze(2)  # [b, t, h, angles]
        one = speed.new_ones(*speed.shape[:2], 1, 1)
        turned, angle = linear_recurrence(one, one, speed, None, angle, offsets)
        B, C = self._keys(bc, acc)
        skip = self.D + dt * mix * (B * C).sum(-1)
        B, C = (turn(part, turned).to(x.dtype) for part in (B, C))

        late, last = _one_late(torch.cat([B, x], -1), last, offsets)
        late_gain, gain = _one_late((dt * mix)[..., None], gain, offsets)
        late_B, late_x = late.split([self.d_state, self.head_dim], -1)
        strength = log_decay.exp()[..., None] * (late_gain + ((1 - mix) * dt)[..., None])
        y, memory = linear_recurrence(C, late_B, (strength * late_x).to(x.dtype), log_decay, memory, offsets)
        y = y + skip[..., None] * x
        y = y if self.norm is None else F.rms_norm(y, y.shape[-1:], eps=1e-5) * self.norm
        y = (y * F.silu(gate)).to(x.dtype)
        # a whole turn changes nothing, and a small angle keeps its digits
        state = Mamba3State(angle.remainder(2 * math.pi), memory, last, gain)
        return self.out(rearrange(y, "b t h p -> b t (h p)")), state

    def _keys(self, bc: Tensor, acc: torch.dtype) -> list[Tensor]:
        """B and C before they turn, [batch, time, heads, d_state] each."""
        parts = rearrange(bc, "b t (two g n) -> two b t g n", two=2, g=self.n_groups).to(acc)
        shared = self.n_heads // self.n_groups
        each = zip(self.norms, parts, self.bias, strict=True)
        return [repeat(norm(part), "b t g n -> b t (g r) n", r=shared) + bias for norm, part, bias in each]

    def empty(self, zeros: Zeros) -> Mamba3State:
        angle, memory = zeros(self.n_heads, 1, self.angles), zeros(self.n_heads, self.d_state, self.head_dim)
        return Mamba3State(
            angle, memory, zeros(1, self.n_heads * (self.d_state + self.head_dim)), zeros(1, self.n_heads)
        )

    def flops_beside(self) -> int:
        """5 per number of the memory: decay, outer product, readout. Then per head: biases and B · C, and 12 per pair
        that turns; per channel: strength, skip and gate."""
        heads = self.n_heads * (4 * self.d_state + 12 * self.angles)
        return 5 * self.channels * self.d_state + heads + 4 * self.channels


def _one_late(x: Tensor, state: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [batch, time, heads, dim] -> the token before, in its document; and the state [rows, 1, heads · dim] after.

    That is a convolution whose tap on the current token is 0.
    """
    flat = rearrange(x, "b t h d -> b t (h d)")
    y, state = causal_conv(flat, F.pad(flat.new_ones(flat.shape[-1], 1), (0, 1)), None, state, offsets)
    return rearrange(y, "b t (h d) -> b t h d", h=x.shape[2]), state
