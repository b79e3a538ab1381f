"""Linear attention (Katharopoulos et al. 2020, "Transformers are RNNs") and its other feature maps."""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.models.mixer import wide
from hybridlab.models.mixers.recurrent import RecurrentMixer, Zeros, divide
from hybridlab.models.parts.norm import RMSNorm
from hybridlab.packing import Packing

Feature = Literal["elu", "relu", "identity", "taylor"]


class LinearState(NamedTuple):
    kv: Tensor  # [batch, heads, feature, value + 1 with normalised: the sum of features], float32 or wider


class LinearAttention(RecurrentMixer):
    """Attention whose weights are φ(q) · φ(k), so that all keys and values seen fit one matrix per head.

    y_t = φ(q_t)ᵀ S_t / φ(q_t)ᵀ z_t,  S_t = S_{t-1} + φ(k_t) v_tᵀ,  z_t = z_{t-1} + φ(k_t)
    (sections 3.2 and 3.3, eq. 7).

    key_dim      channels of q and k per head; None means d_model / n_heads
    feature      φ(x): elu(x) + 1; relu(x); x; or "taylor", (1, x, x ⊗ x / √2) of x / key_dim^(1/4), whose products are
                 the exponential's series up to the square (Arora et al. 2024, "Based"; there key_dim is 16)
    normalised   divide by the sum of weights; otherwise a norm per head (Qin et al. 2022, "The Devil in Linear
                 Transformer", section 4.2). x as its own feature has weights of either sign, and needs the norm
    """

    def __init__(
        self, d_model: int, *, n_heads: int, key_dim: int | None = None, feature: Feature = "elu",
        normalised: bool = True,
    ):  # fmt: skip
        super().__init__()
        if feature not in get_args(Feature):
            raise ValueError(f"feature={feature!r} must be one of {list(get_args(Feature))}")
        if normalised and feature == "identity":
            raise ValueError("feature='identity' has weights that can sum to 0; give normalised=false")
        self.d_model, self.n_heads, self.feature, self.normalised = d_model, n_heads, feature, normalised
        self.head_dim = divide(d_model, n_heads, "d_model", "n_heads")
        self.key_dim = self.head_dim if key_dim is None else key_dim
        self.features = 1 + self.key_dim + self.key_dim**2 if feature == "taylor" else self.key_dim
        self.widths = [n_heads * self.key_dim, n_heads * self.key_dim, d_model]  # q, k, v
        self.inputs = nn.Linear(d_model, sum(self.widths), bias=False)
        self.norm = None if normalised else RMSNorm(self.head_dim)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def scan(self, x: Tensor, state: LinearState | None, packing: Packing | None) -> tuple[Tensor, LinearState]:
        parts = self.inputs(x).split(self.widths, -1)
        q, k, v = (rearrange(part, "b t (h d) -> b t h d", h=self.n_heads) for part in parts)
        q, k = self._features(q), self._features(k)
        # a further value of constant 1 makes the sum of features a column of the state
        values = v if self.norm else F.pad(v, (0, 1), value=1.0).to(wide(v.dtype))
        y, kv = linear_recurrence(q, k, values, None, state and state.kv, packing and packing.offsets)
        # the features may underflow to 0, and then 0 / 0
        y = self.norm(y) if self.norm else (y[..., :-1] / (y[..., -1:] + 1e-6)).to(v.dtype)
        return self.out(rearrange(y, "b t h v -> b t (h v)")), LinearState(kv)

    def _features(self, x: Tensor) -> Tensor:
        """φ(x), [batch, time, heads, key] -> [batch, time, heads, feature]."""
        if self.feature == "elu":
            return F.elu(x) + 1
        if self.feature == "relu":
            return F.relu(x)
        if self.feature == "identity":
            return x
        x = x * self.key_dim**-0.25
        square = rearrange(einsum(x, x, "b t h i, b t h j -> b t h i j"), "b t h i j -> b t h (i j)")
        return torch.cat([torch.ones_like(x[..., :1]), x, square * 0.5**0.5], -1)

    def empty(self, zeros: Zeros) -> LinearState:
        return LinearState(zeros(self.n_heads, self.features, self.head_dim + self.normalised))

    def flops_beside(self) -> int:
        """4 per number of the state: outer product, readout."""
        return 4 * self.n_heads * self.features * (self.head_dim + self.normalised)
