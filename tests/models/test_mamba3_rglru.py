"""What the laws and the authors' numbers leave open: limits of the gates, long documents, initial values, refusals."""

import pytest
import torch
import torch.nn.functional as F

from hybridlab.models.mixers.mamba2 import Mamba2
from hybridlab.models.mixers.mamba3 import Mamba3
from hybridlab.models.mixers.rglru import RGLRU
from hybridlab.testing.laws import distance


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("logit", [-200.0, -80.0, 80.0])
def test_an_rglru_whose_gates_saturate_stays_finite(logit: float) -> None:
    mixer = RGLRU(16, n_blocks=2)
    mixer.gates.bias.detach().unflatten(0, (2, 2, 8))[:, 1] = logit  # of r: at -200 it is exactly 0 in float32
    x = torch.randn(2, 9, 16, requires_grad=True)
    y = mixer(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])
    assert y.isfinite().all() and all(g.isfinite().all() for g in grads)


def test_an_rglru_that_never_forgets_holds_its_first_token() -> None:
    mixer = RGLRU(16, n_blocks=2, d_conv=1).double()
    mixer.gates.bias.detach().unflatten(0, (2, 2, 8))[:, 1] = -50  # a = 1, √(1 - a²) = 0
    x = torch.randn(1, 6, 16).double()
    _, state = mixer.prefill(x, mixer.init_state(1, 6, dtype=torch.float64))
    u = mixer.inputs(x[:, 0]).chunk(2, -1)[0] * mixer.conv.weight[:, 0] + mixer.conv.bias
    gate = mixer.gates(u.unflatten(-1, (1, 2, 8)))[:, 0, :, :8].flatten(1).sigmoid()
    torch.testing.assert_close(state.memory[..., 0], u * gate, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("push", [0.0, 2.0], ids=["both ways", "one way"])
def test_mamba3_keeps_its_angles_over_a_long_document(push: float) -> None:
    """Sums of angles, to thousands of radians where all turn one way, lose less than 1e-4 of the output in float32."""
    mixer, x = Mamba3(16, head_dim=16, d_state=8), torch.randn(1, 4096, 16)
    x[..., 0] = 1
    with torch.no_grad():
        mixer.dt_bias.fill_(-2.25)  # Δ = 0.1
        mixer.inputs.weight[-mixer.angles :, 0] += push
        got = mixer(x)
        want = mixer.double()(x.double())
    assert distance(got, want) <= 1e-4


def test_published_initial_values() -> None:
    step = F.softplus(Mamba3(256, head_dim=8).dt_bias)
    assert 1e-3 * 0.99 <= step.min() < 4e-3 and 0.03 < step.max() <= 0.1 * 1.01
    mixer = Mamba3(32, head_dim=8, output_norm=True)
    assert all((p == 1).all() for p in (mixer.bias, mixer.D, mixer.norm))
    a = torch.exp(-F.softplus(RGLRU(512, n_blocks=4).decay))
    assert 0.9 <= a.min() < 0.91 and 0.99 < a.max() <= 0.9991
    assert RGLRU(512, n_blocks=4).gates.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Mamba3(32, head_dim=24), "head_dim=24 does not divide expand · d_model=64"),
        (lambda: Mamba3(32, head_dim=16, n_groups=3), "n_groups=3 does not divide heads=4"),
        (lambda: Mamba3(32, head_dim=16, d_state=8, rope_dims=0), "rope_dims=0 of d_state=8"),
        (lambda: Mamba3(32, head_dim=16, d_state=8, rope_dims=10), "rope_dims=10"),
        (lambda: RGLRU(32, n_blocks=3), "n_blocks=3 does not divide width=32"),
        (lambda: Mamba2(32, head_dim=16, expand=2, n_heads=3), "expand=2 and n_heads=3"),
        (lambda: Mamba2(32, head_dim=16, n_heads=0), "n_heads=0"),
        (lambda: Mamba2(32, head_dim=16, norm="both"), "norm='both'"),
        (lambda: Mamba2(32, head_dim=16, dt_min=-1.0), "dt_min=-1.0"),
    ],
)
def test_options_that_do_not_fit_are_refused(build, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()
