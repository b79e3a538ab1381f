"""HGRN-2: a gated recurrence whose input gate is what the forget gate leaves (Qin et al. 2024)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.models.mixer import wide
from hybridlab.models.mixers.recurrent import RecurrentMixer, Zeros, divide
from hybridlab.models.parts.norm import RMSNorm
from hybridlab.packing import Packing


class HGRN2State(NamedTuple):
    kv: Tensor  # [batch, heads, key, value], float32 or wider


class HGRN2(RecurrentMixer):
    """Each head keeps a matrix whose rows fade by forget gates, and take in the value by as much as they forget.

    S_t = diag(f_t) S_{t-1} + (1 - f_t) v_tᵀ,  y_t = S_tᵀ silu(q_t),  f = γ + (1 - γ) sigmoid(x W)  (section 3.2),
    and a norm over all heads.

    key_dim       rows of the state per head, the expansion; None means d_model / n_heads
    lower_bound   where γ starts; it is learned per channel. Published: layer / n_layers, so that deeper layers
                  remember longer; 0 for none. HGRN-2 ties the bounds of all layers by a cumulative softmax, here not
    """

    def __init__(self, d_model: int, *, n_heads: int, key_dim: int | None = None, lower_bound: float = 0.0):
        super().__init__()
        if not 0 <= lower_bound < 1:
            raise ValueError(f"lower_bound={lower_bound} must be at least 0 and below 1")
        self.d_model, self.n_heads, self.lower_bound = d_model, n_heads, lower_bound
        self.value_dim = divide(d_model, n_heads, "d_model", "n_heads")
        self.key_dim = self.value_dim if key_dim is None else key_dim
        self.keys = n_heads * self.key_dim
        self.widths = [self.keys, self.keys, d_model]  # q, f, v
        self.inputs = nn.Linear(d_model, sum(self.widths), bias=False)
        self.bound_logit = nn.Parameter(torch.empty(self.keys)) if lower_bound else None
        self.norm = RMSNorm(d_model)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bound_logit is not None:
            self.bound_logit.fill_(self.lower_bound).logit_()

    def scan(self, x: Tensor, state: HGRN2State | None, packing: Packing | None) -> tuple[Tensor, HGRN2State]:
        q, f, v = self.inputs(x).split(self.widths, -1)
        f = f.to(wide(f.dtype))
        log_decay, k = F.logsigmoid(f), torch.sigmoid(-f)
        if self.bound_logit is not None:
            free = F.logsigmoid(-self.bound_logit)  # log(1 - γ)
            # rounding could lift the sum above 1
            log_decay = torch.logaddexp(F.logsigmoid(self.bound_logit), free + log_decay).clamp(max=0)
            k = k * free.exp()
        parts = (F.silu(q), k.to(v.dtype), v, log_decay)
        q, k, v, log_decay = (rearrange(part, "b t (h d) -> b t h d", h=self.n_heads) for part in parts)
        y, kv = linear_recurrence(q, k, v, log_decay, state and state.kv, packing and packing.offsets)
        return self.out(self.norm(rearrange(y, "b t h v -> b t (h v)"))), HGRN2State(kv)

    def empty(self, zeros: Zeros) -> HGRN2State:
        return HGRN2State(zeros(self.n_heads, self.key_dim, self.value_dim))

    def flops_beside(self) -> int:
        """5 per number of the state: decay, outer product, readout."""
        return 5 * self.keys * self.value_dim
