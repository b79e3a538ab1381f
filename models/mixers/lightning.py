"""Lightning attention: linear attention with fixed decays, as in MiniMax-01 (Qin et al. 2024; MiniMax 2025)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.models.mixers.recurrent import RecurrentMixer, Zeros, divide
from hybridlab.models.parts.norm import RMSNorm
from hybridlab.packing import Packing


class LightningState(NamedTuple):
    kv: Tensor  # [batch, heads, key, value], float32 or wider


class Lightning(RecurrentMixer):
    """Each head keeps a matrix that shrinks by exp(-slope) per token and absorbs one outer product k v.

    S_t = exp(-s) S_{t-1} + k_t v_tᵀ,  y_t = S_tᵀ q_t with silu on q, k and v; s = 2^(-8 (head + 1) / heads) times
    1 - depth_ratio; the output is normalised over all heads and gated by a sigmoid (MiniMax-01, section 2.2).

    head_dim      channels per head; None means d_model / n_heads
    depth_ratio   where in the model the layer stands, 0 first to 1 last: deeper layers forget more slowly
    """

    log_decay: Tensor  # [heads], not trained

    def __init__(self, d_model: int, *, n_heads: int, head_dim: int | None = None, depth_ratio: float = 0.0):
        super().__init__()
        if not 0 <= depth_ratio <= 1:
            raise ValueError(f"depth_ratio={depth_ratio} must lie from 0, the first layer, to 1, the last")
        self.d_model, self.n_heads, self.depth_ratio = d_model, n_heads, depth_ratio
        self.head_dim = divide(d_model, n_heads, "d_model", "n_heads") if head_dim is None else head_dim
        self.channels = n_heads * self.head_dim
        self.inputs = nn.Linear(d_model, 4 * self.channels, bias=False)  # q, k, v, gate
        self.norm = RMSNorm(self.channels)
        self.out = nn.Linear(self.channels, d_model, bias=False)
        self.register_buffer("log_decay", torch.empty(n_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        heads = torch.arange(1, self.n_heads + 1, device=self.log_decay.device)
        # the small number keeps a decay in the last layer
        self.log_decay.copy_(-(2.0 ** (-8 * heads / self.n_heads)) * (1 - self.depth_ratio + 1e-5))

    def scan(self, x: Tensor, state: LightningState | None, packing: Packing | None) -> tuple[Tensor, LightningState]:
        *qkv, gate = self.inputs(x).chunk(4, -1)
        q, k, v = (rearrange(F.silu(part), "b t (h d) -> b t h d", h=self.n_heads) for part in qkv)
        y, kv = linear_recurrence(q, k, v, self.log_decay, state and state.kv, packing and packing.offsets)
        y = self.norm(rearrange(y, "b t h d -> b t (h d)")) * torch.sigmoid(gate)
        return self.out(y), LightningState(kv)

    def empty(self, zeros: Zeros) -> LightningState:
        return LightningState(zeros(self.n_heads, self.head_dim, self.head_dim))

    def flops_beside(self) -> int:
        """5 per number of the state: decay, outer product, readout; then the gate."""
        return 5 * self.channels * self.head_dim + self.channels
