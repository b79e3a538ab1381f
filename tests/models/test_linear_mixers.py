"""Linear recurrences against their formulas, token by token; their initial values, ranges and refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlab.models.mixers.deltanet import DeltaNet
from hybridlab.models.mixers.gated_delta import GatedDelta
from hybridlab.models.mixers.gla import GLA
from hybridlab.models.mixers.hgrn2 import HGRN2
from hybridlab.models.mixers.kda import KDA
from hybridlab.models.mixers.lightning import Lightning
from hybridlab.models.mixers.linear_attention import LinearAttention
from hybridlab.models.mixers.mlstm import MLSTM, running_max
from hybridlab.packing import Packing
from hybridlab.testing.laws import distance

D, HEADS = 32, 4
exact = dict(rtol=1e-9, atol=1e-9)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 21, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def shaken(mixer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in mixer.double().parameters():
        p.detach().add_(0.1 * torch.randn_like(p))
    return mixer


def heads(*parts: Tensor) -> list[Tensor]:
    """[batch, time, heads · dim] -> [batch, heads, time, dim]"""
    return [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts]


def decayed(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """S_t = diag(decay_t) S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t, all [batch, heads, time, dim] -> [batch, time, …]."""
    s, ys = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[2]):
        s = decay[:, :, t, :, None] * s + k[:, :, t, :, None] * v[:, :, t, None]
        ys.append((s * q[:, :, t, :, None]).sum(-2))
    return torch.stack(ys, 1)


def test_gla_is_its_formula(x: Tensor) -> None:
    mixer = shaken(GLA(D, n_heads=HEADS))
    q, k, v, gate, low = mixer.inputs(x).split([16, 16, 32, 32, 16], -1)
    alpha = torch.sigmoid(low @ mixer.forget.weight.T + mixer.decay_bias) ** (1 / 16)
    y = decayed(*heads(q / 2, k, v, alpha))
    y = (F.rms_norm(y, (8,), mixer.norm.weight, 1e-6)).flatten(2) * F.silu(gate)
    torch.testing.assert_close(mixer(x), mixer.out(y), **exact)


@pytest.mark.parametrize("bound", [0.0, 0.7])
def test_hgrn2_is_its_formula(x: Tensor, bound: float) -> None:
    mixer = shaken(HGRN2(D, n_heads=HEADS, key_dim=3, lower_bound=bound))
    q, f, v = mixer.inputs(x).split([12, 12, 32], -1)
    gamma = torch.sigmoid(mixer.bound_logit) if bound else 0
    f = gamma + (1 - gamma) * torch.sigmoid(f)
    y = decayed(*heads(F.silu(q), 1 - f, v, f)).flatten(2)
    torch.testing.assert_close(mixer(x), mixer.out(F.rms_norm(y, (D,), mixer.norm.weight, 1e-6)), **exact)


def test_a_closed_forget_gate_of_hgrn2_is_finite_and_an_open_one_within_range() -> None:
    mixer = HGRN2(D, n_heads=HEADS, key_dim=64, lower_bound=0.3)
    with torch.no_grad():
        mixer.inputs.weight.mul_(1e3)
        mixer.bound_logit.copy_(torch.linspace(-8, 8, 256))
    x = torch.randn(2, 50, D).requires_grad_()
    mixer(x).sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, *mixer.parameters()))


def lively(soft_cap: float | None = 15.0, lift: float = 0.0) -> MLSTM:
    """An mLSTM whose gates move, input gates lifted by `lift`."""
    torch.manual_seed(0)
    mixer = shaken(MLSTM(D, n_heads=HEADS, soft_cap=soft_cap))
    with torch.no_grad():
        mixer.gates.weight.normal_()
        mixer.gates_bias[:HEADS] = lift + torch.tensor([-8.0, -1.0, 0.0, 3.0])
    return mixer


def test_mlstm_is_its_formula_without_a_stabiliser(x: Tensor) -> None:
    mixer = lively(soft_cap=5.0)
    q, k, v, gate = mixer.inputs(x).split([16, 16, 32, 32], -1)
    i, f = (5 * torch.tanh((mixer.gates(x) + mixer.gates_bias) / 5)).chunk(2, -1)
    f = torch.sigmoid(f)
    q, k, v, i_, f_ = heads(q / 2, k, v, i, f)
    c = decayed(q, k * i_.exp(), v, f_)
    n = decayed(q, k * i_.exp(), torch.ones_like(v[..., :1]), f_)
    m, ms = torch.zeros_like(i[:, 0]), []
    for t in range(x.shape[1]):  # only where the small number in the denominator is added depends on m
        m = torch.maximum(f[:, t].log() + m, i[:, t])
        ms.append(m)
    y = c / (n.abs().clamp(min=1) + 1e-6 * torch.stack(ms, 1).exp()[..., None])
    y = F.layer_norm(y, (8,), eps=1e-6).flatten(2) * mixer.norm * torch.sigmoid(gate)
    torch.testing.assert_close(mixer(x), mixer.out(y), **exact)


def test_large_input_gates_of_mlstm_neither_overflow_nor_lose_digits(x: Tensor) -> None:
    wide, narrow = lively(None, lift=500.0), lively(None, lift=500.0).float()
    want, y = wide(x), narrow(x.float())
    assert distance(y, want) < 4e-5  # measured: 4e-6; 500 has an ulp of 3e-5
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in narrow.parameters())


def test_mlstm_keeps_its_digits_over_many_tokens() -> None:
    torch.manual_seed(0)
    wide, narrow, x = lively(), lively().float(), torch.randn(1, 1500, D, dtype=torch.float64)
    with torch.no_grad():
        for mixer in (wide, narrow):
            mixer.gates.weight.mul_(0.1)
            mixer.gates_bias[HEADS:] = torch.tensor([2.0, 6.0, 9.0, 12.0])
        want, (y, state) = wide(x), narrow.prefill(x[:, :1400].float(), narrow.init_state(1, 0))
        after, _ = narrow.prefill(x[:, 1400:].float(), state)
    assert distance(torch.cat([y, after], 1), want) < 2e-6  # measured: 2.5e-7


def test_running_max_is_a_maximum_per_document_and_passes_no_nan_on() -> None:
    torch.manual_seed(0)
    lengths = [5, 0, 11, 1, 16]
    i, f, start = torch.randn(1, 33, 2), F.logsigmoid(torch.randn(1, 33, 2)), torch.randn(5, 2)
    i[0, 7] = torch.nan
    m, before, last = running_max(i, f, start, Packing.from_lengths(lengths))
    row = 0
    for doc, length in enumerate(lengths):
        want = start[doc].double()
        for t in range(row, row + length):
            torch.testing.assert_close(before[0, t], want, equal_nan=True)
            want = torch.maximum(f[0, t] + want, i[0, t].double())
            torch.testing.assert_close(m[0, t], want, equal_nan=True)
        torch.testing.assert_close(last[doc], want.float(), equal_nan=True)
        row += length
    assert m[0, 16:].isfinite().all() and m[0, 7:16].isnan().all()


def test_lightning_forgets_more_slowly_in_deeper_layers() -> None:
    first, last = (Lightning(D, n_heads=HEADS, depth_ratio=ratio).log_decay for ratio in (0.0, 1.0))
    torch.testing.assert_close(first, -torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256]) * (1 + 1e-5))
    torch.testing.assert_close(last, first / (1 + 1e-5) * 1e-5, rtol=1e-2, atol=0)


@pytest.mark.parametrize("feature", ["relu", "taylor", "elu"])
def test_linear_attention_is_a_weighted_mean_of_values(x: Tensor, feature: str) -> None:
    mixer = shaken(LinearAttention(D, n_heads=HEADS, key_dim=5, feature=feature))
    q, k, v = heads(*mixer.inputs(x).split([20, 20, 32], -1))
    if feature == "taylor":
        s = q @ k.mT / 5**0.5
        weights = (1 + s + s**2 / 2).tril()
    else:
        phi = F.relu if feature == "relu" else lambda t: F.elu(t) + 1
        weights = (phi(q) @ phi(k).mT).tril()
    y = (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v
    torch.testing.assert_close(mixer(x), mixer.out(y.transpose(1, 2).flatten(2)), **exact)


def test_linear_attention_without_the_sum_is_normalised_per_head(x: Tensor) -> None:
    mixer = shaken(LinearAttention(D, n_heads=HEADS, feature="identity", normalised=False))
    q, k, v = heads(*mixer.inputs(x).chunk(3, -1))
    y = ((q @ k.mT).tril() @ v).transpose(1, 2)
    y = F.rms_norm(y, (8,), mixer.norm.weight, 1e-6).flatten(2)
    torch.testing.assert_close(mixer(x), mixer.out(y), **exact)


@pytest.mark.parametrize("mixer", [GatedDelta, DeltaNet, KDA])
def test_without_the_convolution_its_silu_remains(x: Tensor, mixer: type) -> None:
    off, one = shaken(mixer(D, n_heads=HEADS, d_conv=None)), shaken(mixer(D, n_heads=HEADS, d_conv=1))
    with torch.no_grad():
        one.load_state_dict(off.state_dict() | {"conv.weight": torch.ones(96, 1)})
    torch.testing.assert_close(off(x), one(x), **exact)
    assert off.state_bytes(9) == one.state_bytes(9) == 4 * HEADS * 8 * 8


def test_published_initial_values() -> None:
    torch.manual_seed(0)
    kda, bounded = KDA(256, n_heads=64), KDA(256, n_heads=64, decay_bound=-5.0)
    for mixer in (kda, bounded):
        step = F.softplus(mixer.dt_bias)
        assert 1e-3 * 0.99 <= step.min() < 2e-3 and 0.05 < step.max() <= 0.1 * 1.01
    assert 1 <= kda.A_log.exp().min() < 3 and 14 < kda.A_log.exp().max() <= 16 and (bounded.A_log == 0).all()
    mlstm = MLSTM(D, n_heads=4)
    torch.testing.assert_close(mlstm.gates_bias.detach(), torch.tensor([-10.0, -10, -10, -10, 3, 4, 5, 6]))
    assert (mlstm.gates.weight == 0).all() and (GLA(D, n_heads=4).decay_bias == 0).all()
    torch.testing.assert_close(torch.sigmoid(HGRN2(D, n_heads=4, lower_bound=0.7).bound_logit), torch.full((D,), 0.7))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Lightning(D, n_heads=4, depth_ratio=1.5), "depth_ratio=1.5"),
        (lambda: HGRN2(D, n_heads=4, lower_bound=1.0), "lower_bound=1.0"),
        (lambda: MLSTM(D, n_heads=4, soft_cap=0.0), "soft_cap=0.0"),
        (lambda: KDA(D, n_heads=4, decay_bound=5.0), "decay_bound=5.0"),
        (lambda: GLA(D, n_heads=5), "n_heads=5 does not divide d_model=32"),
        (lambda: DeltaNet(D, n_heads=5), "n_heads=5 does not divide d_model=32"),
        (lambda: LinearAttention(D, n_heads=4, feature="identity"), "normalised=false"),
        (lambda: LinearAttention(D, n_heads=4, feature="cosine"), "feature='cosine'"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(build, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()
