"""Recurrent mixers against their formulas, their initial values, and other implementations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlab.models.mixers.gated_delta import GatedDelta
from hybridlab.models.mixers.linear_attention import LinearAttention
from hybridlab.models.mixers.mamba import Mamba
from hybridlab.models.mixers.mamba2 import Mamba2
from hybridlab.models.mixers.retention import Retention


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 21, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def shaken(mixer: nn.Module) -> nn.Module:
    for p in mixer.double().parameters():
        p.detach().add_(0.1 * torch.randn_like(p))
    return mixer


def copy(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    """Fill `theirs` with our parameters, by name; none may be left over."""
    mine = dict(ours.named_parameters())
    assert set(names) == set(mine) and set(names.values()) == {name for name, _ in theirs.named_parameters()}
    with torch.no_grad():
        for name, other in names.items():
            target = theirs.get_parameter(other)
            target.copy_(mine[name].reshape(target.shape))


def test_linear_attention_is_a_weighted_mean_of_values(x: Tensor) -> None:
    mixer = shaken(LinearAttention(32, n_heads=4))
    q, k, v = (p.unflatten(-1, (4, 8)) for p in mixer.inputs(x).chunk(3, -1))
    weights = torch.einsum("bqhd,bkhd->bhqk", F.elu(q) + 1, F.elu(k) + 1).tril()
    y = torch.einsum("bhqk,bkhd->bqhd", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)
    torch.testing.assert_close(mixer(x), mixer.out(y.flatten(2)), rtol=1e-9, atol=1e-9)


def test_retention_is_attention_with_a_decay_for_distance(x: Tensor) -> None:
    mixer = shaken(Retention(32, n_heads=4))
    q, k, v, gate = mixer.inputs(x).split([32, 32, 64, 64], -1)
    q, k, v = q.unflatten(-1, (4, 8)), k.unflatten(-1, (4, 8)), v.unflatten(-1, (4, 16))
    time = torch.arange(21)
    angle = time[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8).double()  # rotation as a complex factor
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    q, k = (torch.complex(p[..., :4], p[..., 4:]) * turn for p in (q, k))
    gap = (time[:, None] - time).double()
    decay = (1 - 2.0 ** (-5 - torch.arange(4))).double()[:, None, None] ** gap * (gap >= 0)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k.conj()).real * decay * 8**-0.5
    y = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    y = (F.rms_norm(y, (16,), mixer.norm.weight, 1e-6)).flatten(2) * F.silu(gate)
    torch.testing.assert_close(mixer(x), mixer.out(y), rtol=1e-6, atol=1e-6)  # the decay buffer is made in float32


def test_published_initial_values() -> None:
    torch.manual_seed(0)
    for mixer in (Mamba(32), Mamba2(256, head_dim=8), GatedDelta(256, n_heads=64)):
        step = F.softplus(mixer.dt_bias)
        assert 1e-3 * 0.99 <= step.min() < 4e-3 and 0.03 < step.max() <= 0.1 * 1.01
    assert torch.allclose(Mamba(32).A_log.exp(), torch.arange(1.0, 17).expand(64, 16))
    rates = Mamba2(256, head_dim=8).A_log.exp()
    assert rates.min() >= 1 and rates.max() <= 16 and rates.std() > 3
    assert (Mamba2(32, head_dim=8).D == 1).all() and (Mamba(32).D == 1).all()
    torch.testing.assert_close(
        Retention(32, n_heads=3 + 1).log_decay.exp(), 1 - 2.0 ** torch.tensor([-5.0, -6, -7, -8])
    )


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Mamba2(32, head_dim=24), "head_dim=24 does not divide expand · d_model=64"),
        (lambda: Mamba2(32, head_dim=16, n_groups=3), "n_groups=3 does not divide heads=4"),
        (lambda: Mamba2(32, head_dim=16, d_conv=0), "width=0"),
        (lambda: GatedDelta(32, n_heads=3), "n_heads=3 does not divide d_model=32"),
        (lambda: GatedDelta(32, n_heads=4, n_value_heads=6), "n_heads=4 does not divide n_value_heads=6"),
        (lambda: LinearAttention(32, n_heads=5), "n_heads=5 does not divide d_model=32"),
        (lambda: Retention(36, n_heads=4), "rope_dims=9"),
    ],
)
def test_options_that_do_not_fit_are_refused(build, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.long
def test_mamba_equals_transformers(x: Tensor) -> None:
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

    ours, theirs = shaken(Mamba(32, d_state=4)), MambaMixer(MambaConfig(hidden_size=32, state_size=4), 0).double()
    names = {
        "dt_bias": "dt_proj.bias", "A_log": "A_log", "D": "D", "inputs.weight": "in_proj.weight",
        "conv.weight": "conv1d.weight", "conv.bias": "conv1d.bias", "select.weight": "x_proj.weight",
        "dt.weight": "dt_proj.weight", "out.weight": "out_proj.weight",
    }  # fmt: skip
    copy(ours, theirs, names)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)  # theirs scans in float32


@pytest.mark.long
def test_mamba2_equals_transformers(x: Tensor) -> None:
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    config = Mamba2Config(hidden_size=32, state_size=8, num_heads=4, head_dim=16, n_groups=2, chunk_size=16)
    ours, theirs = shaken(Mamba2(32, d_state=8, head_dim=16, n_groups=2)), Mamba2Mixer(config, 0).double()
    names = {
        "dt_bias": "dt_bias", "A_log": "A_log", "D": "D", "norm": "norm.weight", "inputs.weight": "in_proj.weight",
        "conv.weight": "conv1d.weight", "conv.bias": "conv1d.bias", "out.weight": "out_proj.weight",
    }  # fmt: skip
    copy(ours, theirs, names)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)  # theirs scans in float32


@pytest.mark.long
def test_gated_delta_equals_transformers(x: Tensor) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

    sizes = dict(linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
    theirs = Qwen3NextGatedDeltaNet(Qwen3NextConfig(hidden_size=32, **sizes), 0).double()
    ours = shaken(GatedDelta(32, n_heads=4))
    q, k, v, gate, beta, dt = ours.inputs.weight.detach().split([32, 32, 32, 32, 4, 4])
    heads = [p.unflatten(0, (4, 8)) for p in (q, k, v, gate)]  # theirs lies head by head
    with torch.no_grad():
        theirs.in_proj_qkvz.weight.copy_(torch.stack(heads, 1).flatten(0, 2))
        theirs.in_proj_ba.weight.copy_(torch.stack([beta, dt], 1).flatten(0, 1))
        theirs.conv1d.weight.copy_(ours.conv.weight[:, None])
        for name, p in (("dt_bias", ours.dt_bias), ("A_log", ours.A_log), ("norm.weight", ours.norm.weight)):
            theirs.get_parameter(name).copy_(p)
        theirs.out_proj.weight.copy_(ours.out.weight)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)  # theirs works in float32
