"""mLSTM: linear attention with an exponential input gate, as in xLSTM 7B (Beck et al. 2024; 2025)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.models.mixer import wide
from hybridlab.models.mixers.recurrent import RecurrentMixer, Zeros, divide
from hybridlab.models.parts.rope import positions
from hybridlab.packing import Packing


class MLSTMState(NamedTuple):
    kv: Tensor  # [batch, heads, key, value + 1: the normaliser n], both divided by exp(largest), float32 or wider
    largest: Tensor  # [batch, heads], m: log of the largest decayed input gate, float32 or wider


class MLSTM(RecurrentMixer):
    """Each head keeps a weighted sum of outer products k v and of keys k; input gates are exponential.

    C_t = σ(f_t) C_{t-1} + exp(i_t) k_t v_tᵀ,  n_t = σ(f_t) n_{t-1} + exp(i_t) k_t,  y_t = C_tᵀ q_t / max(|n_t q_t|, 1)
    (Beck et al. 2024, section 2.3). C and n are kept divided by exp(m_t), m_t = max(log σ(f_t) + m_{t-1}, i_t), so that
    no gate overflows. Then a norm per head and a sigmoid gate (xLSTM 7B, section 3).

    key_dim, value_dim   channels per head; None means half of value_dim, rounded up, and d_model / n_heads
    soft_cap             i and f become soft_cap · tanh(i / soft_cap); None leaves them
    """

    def __init__(
        self, d_model: int, *, n_heads: int, key_dim: int | None = None, value_dim: int | None = None,
        soft_cap: float | None = 15.0,
    ):  # fmt: skip
        super().__init__()
        if soft_cap is not None and soft_cap <= 0:
            raise ValueError(f"soft_cap={soft_cap} must be above 0, or None")
        self.d_model, self.n_heads, self.soft_cap = d_model, n_heads, soft_cap
        self.value_dim = divide(d_model, n_heads, "d_model", "n_heads") if value_dim is None else value_dim
        self.key_dim = -(-self.value_dim // 2) if key_dim is None else key_dim
        self.keys, self.values = n_heads * self.key_dim, n_heads * self.value_dim
        self.widths = [self.keys, self.keys, self.values, self.values]  # q, k, v, gate
        self.inputs = nn.Linear(d_model, sum(self.widths), bias=False)
        self.gates = nn.Linear(d_model, 2 * n_heads, bias=False)  # i, f
        self.gates_bias = nn.Parameter(torch.empty(2 * n_heads))
        self.norm = nn.Parameter(torch.empty(self.values))
        self.out = nn.Linear(self.values, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.gates.weight)
        i, f = self.gates_bias.chunk(2)
        i.fill_(-10)
        f.copy_(torch.linspace(3, 6, self.n_heads, device=f.device))
        nn.init.ones_(self.norm)

    def scan(self, x: Tensor, state: MLSTMState | None, packing: Packing | None) -> tuple[Tensor, MLSTMState]:
        kv, largest = state or (None, None)
        parts = self.inputs(x).split(self.widths, -1)
        q, k, v, gate = (rearrange(part, "b t (h d) -> b t h d", h=self.n_heads) for part in parts)
        i, f = self._gates(x)
        m, before, largest = running_max(i.detach(), f.detach(), largest, packing)
        # m is a constant here: it cancels between C and n, and so does its gradient
        k = k * (i - m).exp().to(i.dtype)[..., None]
        log_decay = f + (before - m)
        log_decay = (log_decay - log_decay.detach().clamp(min=0)).to(i.dtype)  # rounding, which has no gradient
        # a further value of constant 1 makes n a column of the state
        v = F.pad(v, (0, 1), value=1.0).to(k.dtype)
        y, kv = linear_recurrence(q * self.key_dim**-0.5, k, v, log_decay, kv, packing and packing.offsets)
        least = (-m).exp().to(y.dtype)[..., None]
        y = y[..., :-1] / (y[..., -1:].abs().maximum(least) + 1e-6)  # exp(-m) may underflow to 0
        y = F.layer_norm(y, (self.value_dim,), eps=1e-6) * rearrange(self.norm, "(h v) -> h v", h=self.n_heads)
        y = (y * torch.sigmoid(gate)).to(gate.dtype)
        return self.out(rearrange(y, "b t h v -> b t (h v)")), MLSTMState(kv, largest)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """i and log σ(f), both [batch, time, heads], float32 or wider."""
        gates = self.gates(x)
        gates = gates.to(wide(gates.dtype)) + self.gates_bias
        gates = gates if self.soft_cap is None else self.soft_cap * torch.tanh(gates / self.soft_cap)
        i, f = gates.chunk(2, -1)
        return i, F.logsigmoid(f)

    def empty(self, zeros: Zeros) -> MLSTMState:
        return MLSTMState(zeros(self.n_heads, self.key_dim, self.value_dim + 1), zeros(self.n_heads))

    def flops_beside(self) -> int:
        """5 per number of the state: decay, outer product, readout; then the gate."""
        return 5 * self.keys * (self.value_dim + 1) + self.values


def running_max(i: Tensor, f: Tensor, start: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor]:
    """m_t = max(f_t + m_{t-1}, i_t), by doubling the number of tokens that each token has seen.

    i, f      [batch, time, heads]
    start     [rows, heads]: m before the first token; zeros if None
    returns   m, and m before each token, [batch, time, heads], float64: differences of sums of f must keep their
              digits; m after the last token [rows, heads], in the dtype of i
    """
    where, dtype = positions(i, None, packing)[..., None], i.dtype
    rows = len(i) if packing is None else len(packing.offsets) - 1
    start = i.new_zeros(rows, i.shape[-1]) if start is None else start
    if packing is not None:
        packing.check(len(i), i.shape[1], docs=len(start))
    entering = (start[:, None] if packing is None else start[packing.row_ids(i.shape[1])]).double()
    i, f = i.double(), f.double()
    seen = 1
    while seen < i.shape[1]:
        inside = where >= seen  # select: another document may hold NaN
        earlier_i, earlier_f = (F.pad(x, (0, 0, seen, 0))[:, : i.shape[1]] for x in (i, f))
        i = torch.where(inside, torch.maximum(i, f + earlier_i), i)
        f = torch.where(inside, f + earlier_f, f)
        seen *= 2
    m = torch.maximum(i, f + entering)
    before = torch.where(where == 0, entering, F.pad(m, (0, 0, 1, 0))[:, : m.shape[1]])
    if packing is None:
        return m, before, (m[:, -1] if m.shape[1] else start).to(dtype)
    last, lengths = (packing.offsets[1:].long() - 1).clamp(min=0), packing.offsets.diff()
    after = m[0].index_select(0, last) if m.shape[1] else start
    return m, before, torch.where(lengths[:, None] == 0, start, after.to(dtype))
