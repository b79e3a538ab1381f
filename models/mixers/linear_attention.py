"""Linear attention (Katharopoulos et al. 2020, "Transformers are RNNs")."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.models.mixer import wide
from hybridlab.models.mixers.recurrent import RecurrentMixer, Zeros, divide
from hybridlab.models.parts.norm import RMSNorm
from hybridlab.packing import Packing

FEATURES = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu, "identity": lambda x: x}


class LinearState(NamedTuple):
    kv: Tensor  # [batch, heads, key, value (+ 1: the sum of keys)], float32 or wider


class LinearAttention(RecurrentMixer):
    """Attention whose weights are φ(q) · φ(k), so that all keys and values seen fit one matrix per head.

    y_t = φ(q_t)ᵀ S_t / φ(q_t)ᵀ z_t,  S_t = S_{t-1} + φ(k_t) v_tᵀ,  z_t = z_{t-1} + φ(k_t)  (sections 3.2 and 3.3).

    feature     φ: "elu" is elu(x) + 1 (eq. 7); "relu"; or "identity"
    normalise   divide by φ(q)ᵀ z; false leaves that to a norm of each head's output (Qin et al. 2022, section 4.1)
    """

    def __init__(
        self, d_model: int, *, n_heads: int, feature: Literal["elu", "relu", "identity"] = "elu", normalise: bool = True
    ):
        super().__init__()
        if feature not in FEATURES or (feature == "identity" and normalise):
            raise ValueError(f"feature={feature!r}: give one of {list(FEATURES)}, and normalise=false with identity")
        self.d_model, self.n_heads, self.feature = d_model, n_heads, feature
        self.head_dim = divide(d_model, n_heads, "n_heads into d_model")
        self.inputs = nn.Linear(d_model, 3 * d_model, bias=False)  # q, k, v
        self.norm = RMSNorm(self.head_dim) if not normalise else None
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def scan(self, x: Tensor, state: LinearState | None, packing: Packing | None) -> tuple[Tensor, LinearState]:
        q, k, v = rearrange(self.inputs(x), "b t (three h k) -> three b t h k", three=3, h=self.n_heads)
        q, k = FEATURES[self.feature](q), FEATURES[self.feature](k)
        # a further value of constant 1 makes the sum of keys a column of the state
        v = v if self.norm is not None else torch.cat([v, torch.ones_like(v[..., :1])], -1).to(wide(v.dtype))
        y, kv = linear_recurrence(q, k, v, None, state and state.kv, packing and packing.offsets)
        # relu can make all weights zero, and then 0 / 0
        y = self.norm(y) if self.norm is not None else (y[..., :-1] / (y[..., -1:] + 1e-6)).to(q.dtype)
        return self.out(rearrange(y, "b t h v -> b t (h v)")), LinearState(kv)

    def empty(self, zeros: Zeros) -> LinearState:
        return LinearState(zeros(self.n_heads, self.head_dim, self.head_dim + (self.norm is None)))

    def flops_beside(self) -> int:
        """4 per number of the state: outer product, readout."""
        return 4 * self.d_model * (self.head_dim + (self.norm is None))
