"""Linear recurrences beside the layers of the same name in transformers: equal weights, outputs and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hybridlab.models.mixers.deltanet import DeltaNet
from hybridlab.models.mixers.gated_delta import GatedDelta
from hybridlab.models.mixers.kda import KDA
from hybridlab.models.mixers.lightning import Lightning
from hybridlab.models.mixers.mlstm import MLSTM
from hybridlab.packing import Packing
from hybridlab.testing.laws import distance

D, HEADS, HEAD, TIME = 32, 4, 8, 150
SIZES = dict(linear_num_key_heads=2, linear_num_value_heads=HEADS, linear_key_head_dim=HEAD, linear_value_head_dim=6)


@pytest.fixture(scope="module")
def layers() -> Callable[[str], object]:
    pytest.importorskip("transformers")
    return lambda name: __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["x"])


def shaken(mixer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in mixer.parameters():
        p.detach().add_(0.1 * torch.randn_like(p))
    return mixer


@torch.no_grad()
def fill(theirs: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give every parameter of `theirs` its value; none may be left over."""
    assert set(weights) == {name for name, _ in theirs.named_parameters()}
    for name, value in weights.items():
        target = theirs.get_parameter(name)
        target.copy_(value.reshape(target.shape))


def agree(ours: nn.Module, theirs: Callable[[Tensor], Tensor], allowed: float = 1e-5) -> None:
    """Outputs and gradients of the input, in float32; and our documents, packed, are theirs alone."""
    x = torch.randn(2, TIME, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y, want = ours(x), theirs(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    grad, want_grad = (torch.autograd.grad(out, x, upstream)[0] for out in (y, want))
    error, grad_error = distance(y, want), distance(grad, want_grad)
    print(f"\n{type(ours).__name__}: outputs {error:.1e}, gradients {grad_error:.1e}")
    assert error <= allowed and grad_error <= allowed
    packed = ours(x, Packing.from_lengths([TIME - 7, 7, 90, 0, TIME - 90]))
    alone = torch.cat([theirs(doc[None])[0] for doc in x.flatten(0, 1).split([TIME - 7, 7, 90, TIME - 90])])
    assert distance(packed.flatten(0, 1), alone) <= allowed


def delta_weights(ours: nn.Module, names: dict[str, list[int]]) -> dict[str, Tensor]:
    """The rows of our first projection by the names of theirs, in order; convolution, norm and output beside."""
    rows = ours.inputs.weight.split([n for sizes in names.values() for n in sizes])
    return dict(zip(names, rows, strict=True)) | {
        "conv1d.weight": ours.conv.weight, "o_norm.weight": ours.norm.weight, "o_proj.weight": ours.out.weight,
    }  # fmt: skip


KDA_ROWS = {f"{name}_proj.weight": [n] for name, n in zip("qkvb", (D, D, D, HEADS), strict=True)}
KDA_ROWS |= {"forget_gate.f_a_proj.weight": [HEAD], "g_a_proj.weight": [HEAD]}


def fill_kda(theirs: nn.Module, ours: KDA) -> None:
    own = {
        "forget_gate.A_log": ours.A_log, "forget_gate.dt_bias": ours.dt_bias,
        "forget_gate.f_b_proj.weight": ours.forget.weight, "g_b_proj.weight": ours.gate.weight,
    }  # fmt: skip
    fill(theirs, delta_weights(ours, KDA_ROWS) | own)


def test_kda_is_kimi_linears(layers) -> None:
    kimi = layers("kimi_linear")
    config = kimi.KimiLinearConfig(hidden_size=D, linear_num_heads=HEADS, linear_head_dim=HEAD, rms_norm_eps=1e-6)
    ours, theirs = shaken(KDA(D, n_heads=HEADS)), kimi.KimiLinearDeltaAttention(config, 0)
    fill_kda(theirs, ours)
    agree(ours, theirs)


def test_kda_with_a_bound_is_glms(layers) -> None:
    glm = layers("glm5_next")
    config = glm.Glm5NextTextConfig(hidden_size=D, linear_num_heads=HEADS, linear_head_dim=HEAD, rms_norm_eps=1e-6)
    ours, theirs = shaken(KDA(D, n_heads=HEADS, decay_bound=-5.0)), glm.Glm5NextTextLinearAttention(config, 0)
    assert config.linear_lower_bound == -5
    fill_kda(theirs, ours)
    agree(ours, theirs)


def test_gated_delta_is_qwen3_nexts(layers) -> None:
    qwen = layers("qwen3_next")
    theirs = qwen.Qwen3NextGatedDeltaNet(qwen.Qwen3NextConfig(hidden_size=D, **SIZES), 0)
    ours = shaken(GatedDelta(D, n_heads=2, n_value_heads=HEADS, key_dim=HEAD, value_dim=6))
    q, k, v, gate, beta, dt = ours.inputs.weight.split([16, 16, 24, 24, 4, 4])
    by_key_head = [part.unflatten(0, (2, -1)) for part in (q, k, v, gate)]  # theirs lies key head by key head
    weights = {
        "in_proj_qkvz.weight": torch.cat(by_key_head, 1),
        "in_proj_ba.weight": torch.cat([part.unflatten(0, (2, 2)) for part in (beta, dt)], 1),
        "conv1d.weight": ours.conv.weight, "dt_bias": ours.dt_bias, "A_log": ours.A_log,
        "norm.weight": ours.norm.weight, "out_proj.weight": ours.out.weight,
    }  # fmt: skip
    fill(theirs, weights)
    agree(ours, theirs)


def olmo(layers, ours: nn.Module, names: dict[str, list[int]], rest: dict[str, Tensor]) -> nn.Module:
    module = layers("olmo_hybrid")
    sizes = SIZES | dict(linear_num_key_heads=HEADS)
    theirs = module.OlmoHybridGatedDeltaNet(module.OlmoHybridConfig(hidden_size=D, **sizes), 0)
    theirs.o_norm.eps = theirs.o_norm.variance_epsilon = 1e-6
    fill(theirs, delta_weights(ours, names) | rest)
    assert theirs.allow_neg_eigval
    return theirs


def test_gated_delta_with_negative_eigenvalues_is_olmo_hybrids(layers) -> None:
    ours = shaken(GatedDelta(D, n_heads=HEADS, key_dim=HEAD, value_dim=6, negative_eigenvalues=True))
    sizes = zip("qkvgba", (D, D, 24, 24, HEADS, HEADS), strict=True)
    names = {f"{name}_proj.weight": [n] for name, n in sizes}
    agree(ours, olmo(layers, ours, names, {"A_log": ours.A_log, "dt_bias": ours.dt_bias}))


def test_deltanet_is_olmo_hybrids_without_decay(layers) -> None:
    ours = shaken(DeltaNet(D, n_heads=HEADS, value_dim=6, output_gate=True, negative_eigenvalues=True))
    names = {f"{name}_proj.weight": [n] for name, n in zip("qkvbg", (D, D, 24, HEADS, 24), strict=True)}
    none = {"A_log": torch.full((HEADS,), -1e4), "dt_bias": torch.zeros(HEADS), "a_proj.weight": torch.zeros(HEADS, D)}
    agree(ours, olmo(layers, ours, names, none))


@pytest.mark.parametrize("layer", [0, 2])
def test_lightning_is_minimaxs(layers, layer: int) -> None:
    minimax = layers("minimax")
    config = minimax.MiniMaxConfig(
        hidden_size=D, num_attention_heads=HEADS, head_dim=6, num_hidden_layers=4, block_size=64, hidden_act="silu",
        layer_types=["linear_attention"] * 4,
    )  # fmt: skip
    theirs = minimax.MiniMaxLightningAttention(config, layer)
    ours = shaken(Lightning(D, n_heads=HEADS, head_dim=6, depth_ratio=layer / 3))
    *qkv, gate = ours.inputs.weight.chunk(4)
    weights = {
        "qkv_proj.weight": torch.stack([part.unflatten(0, (HEADS, 6)) for part in qkv], 1),
        "output_gate.weight": gate, "norm.weight": ours.norm.weight, "out_proj.weight": ours.out.weight,
    }  # fmt: skip
    fill(theirs, weights)
    agree(ours, lambda x: theirs(x, None, None)[0])


@pytest.mark.parametrize("soft_cap", [15.0, 2.0])
def test_mlstm_is_xlstms(layers, soft_cap: float) -> None:
    xlstm = layers("xlstm")
    config = xlstm.xLSTMConfig(hidden_size=D, num_heads=HEADS, gate_soft_cap=soft_cap, mode="inference", chunk_size=16)
    theirs = xlstm.xLSTMLayer(config)
    ours = shaken(MLSTM(D, n_heads=HEADS, soft_cap=soft_cap))
    with torch.no_grad():
        ours.gates.weight.normal_(std=0.3)
        ours.gates_bias[:HEADS] = torch.tensor([-10.0, -3.0, 0.0, 6.0])
    q, k, v, gate = ours.inputs.weight.split(ours.widths)
    (i, f), (i_bias, f_bias) = ours.gates.weight.chunk(2), ours.gates_bias.chunk(2)
    weights = {
        "q.weight": q, "k.weight": k, "v.weight": v, "ogate_preact.weight": gate, "out_proj.weight": ours.out.weight,
        "igate_preact.weight": i, "igate_preact.bias": i_bias, "fgate_preact.weight": f, "fgate_preact.bias": f_bias,
        "multihead_norm.weight": ours.norm,
    }  # fmt: skip
    fill(theirs, weights)
    agree(ours, lambda x: theirs(x)[0])
