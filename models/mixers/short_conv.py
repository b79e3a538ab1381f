"""Double-gated short convolution, the cheap layer of LFM2 (Liquid AI 2025, arXiv 2511.23404, section 2)."""

from typing import NamedTuple

from torch import Tensor, nn

from hybridlab.models.mixers.recurrent import RecurrentMixer, Zeros
from hybridlab.models.parts.conv import ShortConv
from hybridlab.packing import Packing


class GatedShortConvState(NamedTuple):
    conv: Tensor  # [batch, width - 1, d_model], float32 or wider


class GatedShortConv(RecurrentMixer):
    """y = out(C ⊙ conv(B ⊙ x)): B, C and x are linear in the token, and all memory is the convolution's window.

    width   tokens the convolution sees, the current one included
    """

    def __init__(self, d_model: int, *, width: int = 3):
        super().__init__()
        self.d_model = d_model
        self.inputs = nn.Linear(d_model, 3 * d_model, bias=False)  # B, C, x
        self.conv = ShortConv(d_model, width=width, silu=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def scan(
        self, x: Tensor, state: GatedShortConvState | None, packing: Packing | None
    ) -> tuple[Tensor, GatedShortConvState]:
        B, C, x = self.inputs(x).chunk(3, -1)
        y, conv = self.conv(B * x, state and state.conv, packing)
        return self.out(C * y), GatedShortConvState(conv)

    def empty(self, zeros: Zeros) -> GatedShortConvState:
        return GatedShortConvState(zeros(self.conv.width - 1, self.d_model))

    def flops_beside(self) -> int:
        """Two gates."""
        return 2 * self.d_model
