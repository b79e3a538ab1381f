"""Linear attention (Katharopoulos et al. 2020, "Transformers are RNNs")."""

from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.models.mixer import wide
from hybridlab.models.mixers.recurrent import RecurrentMixer, Zeros, divide
from hybridlab.packing import Packing


class LinearState(NamedTuple):
    kv: Tensor  # [batch, heads, key, value + 1: the sum of keys], float32 or wider


class LinearAttention(RecurrentMixer):
    """Attention whose weights are φ(q) · φ(k), so that all keys and values seen fit one matrix per head.

    y_t = φ(q_t)ᵀ S_t / φ(q_t)ᵀ z_t,  S_t = S_{t-1} + φ(k_t) v_tᵀ,  z_t = z_{t-1} + φ(k_t),  φ(x) = elu(x) + 1
    (sections 3.2 and 3.3, eq. 7).
    """

    def __init__(self, d_model: int, *, n_heads: int):
        super().__init__()
        self.d_model, self.n_heads = d_model, n_heads
        self.head_dim = divide(d_model, n_heads, "d_model", "n_heads")
        self.inputs = nn.Linear(d_model, 3 * d_model, bias=False)  # q, k, v
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def scan(self, x: Tensor, state: LinearState | None, packing: Packing | None) -> tuple[Tensor, LinearState]:
        q, k, v = rearrange(self.inputs(x), "b t (three h k) -> three b t h k", three=3, h=self.n_heads)
        # a further value of constant 1 makes the sum of keys a column of the state
        values = F.pad(v, (0, 1), value=1.0).to(wide(v.dtype))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y, kv = linear_recurrence(q, k, values, None, state and state.kv, packing and packing.offsets)
        y = (y[..., :-1] / (y[..., -1:] + 1e-6)).to(v.dtype)  # elu + 1 underflows to 0, and then 0 / 0
        return self.out(rearrange(y, "b t h v -> b t (h v)")), LinearState(kv)

    def empty(self, zeros: Zeros) -> LinearState:
        return LinearState(zeros(self.n_heads, self.head_dim, self.head_dim + 1))

    def flops_beside(self) -> int:
        """4 per number of the state: outer product, readout."""
        return 4 * self.d_model * (self.head_dim + 1)
