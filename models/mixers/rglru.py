"""RG-LRU: a gated linear recurrence, one number per channel (De et al. 2024, "Griffin", arXiv 2402.19427)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from hybridlab.kernels.selective_scan import selective_scan
from hybridlab.models.mixer import wide
from hybridlab.models.mixers.recurrent import RecurrentMixer, Zeros, divide
from hybridlab.models.parts.conv import ShortConv
from hybridlab.models.parts.rope import positions
from hybridlab.packing import Packing


class RGLRUState(NamedTuple):
    conv: Tensor  # [batch, d_conv - 1, width], float32 or wider
    memory: Tensor  # [batch, width, 1], float32 or wider
    length: Tensor  # int64 [batch], tokens seen


class BlockLinear(nn.Linear):
    """A linear layer whose matrix is block-diagonal: [n_blocks · d_out, d_in], one block of rows per block of input."""

    def __init__(self, d_in: int, d_out: int, *, n_blocks: int):
        super().__init__(d_in, n_blocks * d_out)
        self.n_blocks = n_blocks

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, time, n_blocks, d_in] -> [batch, time, n_blocks, d_out]"""
        weight = rearrange(self.weight, "(g o) i -> g o i", g=self.n_blocks)
        return einsum(x, weight, "b t g i, g o i -> b t g o") + rearrange(self.bias, "(g o) -> g o", g=self.n_blocks)


class RGLRU(RecurrentMixer):
    """The recurrent block of Griffin, Hawk and RecurrentGemma: a convolution and RG-LRU beside a GeLU branch.

    h_t = a_t h_{t-1} + √(1 - a_t²) i_t x_t,  a_t = exp(-8 softplus(Λ) r_t)  (section 2.4, eqs. 1 to 4), with gates r
    and i in (0, 1) from block-diagonal matrices. The first token of a document has no history to make room for and
    enters unscaled: √(1 - a²) counts as 1 (google-deepmind/recurrentgemma).

    width     channels; None means d_model
    n_blocks  blocks of the gates' matrices; RecurrentGemma has as many as attention heads

    The recurrence is a selective scan of state 1 with Δ = -log a and A = -1, whose input Δ B x gets the missing factor
    √(1 - a²) / Δ; as a linear recurrence with a head per channel it took 38 times as long on a CPU core. The authors
    clip the derivative of the root at 1000 against division by zero; here Δ is bounded below, where the product of that
    derivative with Δ's own has long vanished.
    """

    def __init__(self, d_model: int, *, n_blocks: int, width: int | None = None, d_conv: int = 4):
        super().__init__()
        self.d_model, self.n_blocks = d_model, n_blocks
        self.width = d_model if width is None else width
        block = divide(self.width, n_blocks, "width", "n_blocks")
        self.inputs = nn.Linear(d_model, 2 * self.width)  # x, GeLU branch
        self.conv = ShortConv(self.width, width=d_conv, bias=True, silu=False)
        self.gates = BlockLinear(block, 2 * block, n_blocks=n_blocks)  # i, r
        self.decay = nn.Parameter(torch.empty(self.width))  # Λ
        self.out = nn.Linear(self.width, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """softplus(Λ) = -log a, with a² uniform between 0.9² and 0.999²: a ring of the unit disk."""
        super().reset_parameters()
        rate = nn.init.uniform_(self.decay, 0.9**2, 0.999**2).log() / -2
        self.decay.copy_(rate.expm1().log())

    def scan(self, x: Tensor, state: RGLRUState | None, packing: Packing | None) -> tuple[Tensor, RGLRUState]:
        conv, memory, length = state or (None, None, None)
        first = rearrange(positions(x, length, packing) == 0, "b t -> b t 1")
        seen = x.shape[1] if packing is None else packing.offsets.diff()
        x, branch = self.inputs(x).chunk(2, -1)
        x, conv = self.conv(x, conv, packing)
        u, step = self._gated(x, first)
        one = step.new_ones(*step.shape[:2], 1)
        y, memory = selective_scan(
            u, step, -step.new_ones(self.width, 1), one, one, None, memory, packing and packing.offsets
        )
        y = y.to(x.dtype) * F.gelu(branch, approximate="tanh")
        length = memory.new_zeros(len(memory), dtype=torch.int64) if length is None else length
        return self.out(y), RGLRUState(conv, memory, length + seen)

    def _gated(self, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """x [batch, time, width], bool first [batch or 1, time, 1] -> what the scan takes in, and its steps Δ."""
        blocks = self.gates(rearrange(x, "b t (g d) -> b t g d", g=self.n_blocks))
        blocks = blocks.to(wide(x.dtype)).sigmoid()
        i, r = (rearrange(part, "b t g d -> b t (g d)") for part in blocks.chunk(2, -1))
        step = (8 * F.softplus(self.decay) * r).clamp(min=1e-12)  # a gate of exactly 0 would divide by it
        scale = torch.where(first, 1.0, torch.sqrt(-torch.expm1(-2 * step)))
        return x * i * scale / step, step

    def empty(self, zeros: Zeros) -> RGLRUState:
        return RGLRUState(zeros(self.conv.width - 1, self.width), zeros(self.width, 1), zeros().long())

    def flops_beside(self) -> int:
        """Per channel: rate, 1 - a², both gates' products, decay and input, branch."""
        return 8 * self.width
