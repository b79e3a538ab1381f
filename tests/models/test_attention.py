"""Attention against softmax written out, pair by pair, and what it refuses."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridlab.models.mixers import attention
from hybridlab.models.mixers.attention import Attention
from hybridlab.packing import Packing

OPTIONS = {
    "plain": dict(n_heads=4),
    "grouped": dict(n_heads=4, n_kv_heads=2, head_dim=6),
    "window": dict(n_heads=2, window=5),
    "partial_rope": dict(n_heads=2, rope_dims=4, rope_theta=100.0),
    "no_positions": dict(n_heads=2, rope_dims=0),
    "qk_norm": dict(n_heads=2, qk_norm=True),
    "sinks": dict(n_heads=4, n_kv_heads=2, sinks=True),
    "output_gate": dict(n_heads=2, output_gate=True),
    "soft_cap": dict(n_heads=2, soft_cap=1.5),
}


def build(options: dict, d_model: int = 16) -> Attention:
    torch.manual_seed(0)
    mixer = Attention(d_model, **options).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return mixer


def turn(x: Tensor, position: int, dims: int, theta: float) -> Tensor:
    """One head of one token, channel pair by channel pair."""
    y = x.clone()
    for i in range(dims // 2):
        angle, j = position * theta ** (-2 * i / dims), i + dims // 2
        y[i] = x[i] * math.cos(angle) - x[j] * math.sin(angle)
        y[j] = x[j] * math.cos(angle) + x[i] * math.sin(angle)
    return y


def by_hand(m: Attention, x: Tensor) -> Tensor:
    """One document x [time, d_model], every pair of tokens in a loop."""
    q, k, v, gate = (m.inputs.weight @ x.T).T.split([n * m.head_dim for n in m.heads], 1)
    q, k, v, gate = (part.reshape(len(x), -1, m.head_dim) for part in (q, k, v, gate))
    if m.norms is not None:
        q, k = (
            p / (p.square().mean(-1, keepdim=True) + 1e-6).sqrt() * n.weight
            for p, n in zip((q, k), m.norms, strict=True)
        )
    dims, out = m.head_dim if m.rope_dims is None else m.rope_dims, torch.zeros(len(x), m.n_heads, m.head_dim).double()
    for t in range(len(x)):
        for h in range(m.n_heads):
            g = h // (m.n_heads // m.n_kv_heads)
            seen = range(0 if m.window is None else max(0, t - m.window + 1), t + 1)
            query = turn(q[t, h], t, dims, m.rope_theta)
            scores = [query @ turn(k[s, g], s, dims, m.rope_theta) / math.sqrt(m.head_dim) for s in seen]
            scores = [s if m.soft_cap is None else m.soft_cap * torch.tanh(s / m.soft_cap) for s in scores]
            weights = [s.exp() for s in scores]
            total = sum(weights) + (0 if m.sinks is None else m.sinks[h].exp())
            out[t, h] = sum(w / total * v[s, g] for w, s in zip(weights, seen, strict=True))
            if m.output_gate:
                out[t, h] = out[t, h] * torch.sigmoid(gate[t, h])
    return (m.out.weight @ out.reshape(len(x), -1).T).T


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_equals_softmax_written_out(name: str) -> None:
    mixer = build(OPTIONS[name])
    x = torch.randn(1, 11, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[0], by_hand(mixer, x[0]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "window", "sinks"])
def test_blocks_of_queries_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = build(OPTIONS[name]), torch.randn(2, 23, 16, dtype=torch.float64)
    packing = Packing.from_lengths([23, 9, 1, 13])
    whole = mixer(x), mixer(x, packing)
    monkeypatch.setattr(attention, "BLOCK", 4)
    torch.testing.assert_close((mixer(x), mixer(x, packing)), whole, rtol=1e-12, atol=1e-12)


def test_a_window_never_touches_keys_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x, touched = build(OPTIONS["window"]), torch.randn(1, 64, 16, dtype=torch.float64), []
    attend = attention.attend
    monkeypatch.setattr(attention, "BLOCK", 8)
    monkeypatch.setattr(attention, "attend", lambda q, k, *rest: touched.append(k.shape[1]) or attend(q, k, *rest))
    mixer(x)
    assert max(touched) == 8 + 5 - 1


def test_the_state_of_a_window_is_a_ring() -> None:
    mixer = build(dict(n_heads=2, window=5))
    assert mixer.init_state(3, 100).k.shape == (3, 2, 5, 8) and mixer.init_state(3, 4).k.shape == (3, 2, 4, 8)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    state, ys = mixer.init_state(2, 40, dtype=torch.float64), []
    with torch.no_grad():
        for start, stop in ((0, 3), (3, 4), (4, 17), (17, 19), (19, 40)):
            y, state = mixer.prefill(x[:, start:stop], state)
            ys.append(y)
        torch.testing.assert_close(torch.cat(ys, 1), mixer(x), rtol=1e-12, atol=1e-12)
    assert state.length.tolist() == [40, 40]


@pytest.mark.parametrize("window", [None, 50])
def test_beyond_max_len_it_raises_with_the_numbers(window: int | None) -> None:
    mixer, x = build(dict(n_heads=2, window=window)), torch.randn(1, 9, 16, dtype=torch.float64)
    _, state = mixer.prefill(x[:, :8], mixer.init_state(1, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="max_len=8.* 9"):
        mixer.step(x[:, 8], state)
    with pytest.raises(ValueError, match="max_len=8.* 9"):
        mixer.prefill(x, mixer.init_state(1, 8, dtype=torch.float64))


@pytest.mark.parametrize("options", [dict(n_heads=4), dict(n_heads=4, n_kv_heads=2), dict(n_heads=4, window=16)])
def test_a_step_with_a_full_state_costs_what_flops_says(options: dict) -> None:
    mixer, max_len = build(options, d_model=32), 24
    _, state = mixer.prefill(
        torch.randn(1, max_len - 1, 32).double(), mixer.init_state(1, max_len, dtype=torch.float64)
    )
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mixer.step(torch.randn(1, 32).double(), state)
    assert counter.get_total_flops() == mixer.flops(max_len) - mixer.flops(max_len - 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(n_heads=3), "n_heads=3 does not divide d_model=16"),
        (dict(n_heads=4, n_kv_heads=3), "n_kv_heads=3 does not divide n_heads=4"),
        (dict(n_heads=4, n_kv_heads=0), "n_kv_heads=0 does not divide n_heads=4"),
        (dict(n_heads=4, window=0), "window=0"),
        (dict(n_heads=4, soft_cap=0.0), "soft_cap=0.0"),
        (dict(n_heads=4, rope_dims=3), "rope_dims=3"),
        (dict(n_heads=4, rope_dims=6), "rope_dims=6 of head_dim=4"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Attention(16, **options)
