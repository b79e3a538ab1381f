"""State-space layers against those of transformers, whole layers with equal random weights: outputs and gradients."""

import pytest
import torch
from einops import rearrange
from torch import nn

from hybridlab.models.mixers.mamba import Mamba
from hybridlab.models.mixers.mamba2 import Mamba2
from hybridlab.models.mixers.rglru import RGLRU
from hybridlab.models.mixers.short_conv import GatedShortConv
from hybridlab.testing.laws import distance

TOLERANCE = 1e-5  # float32 in both; they associate sums differently
D, TIME = 32, 41


def randomised(mixer):
    torch.manual_seed(0)
    for p in mixer.parameters():
        p.detach().add_(0.1 * torch.randn_like(p))
    return mixer


def assert_same(ours, theirs: nn.Module, names: dict, run) -> None:
    """`names`: each parameter of theirs -> its value; together they must be all parameters of theirs and of ours."""
    assert names.keys() == dict(theirs.named_parameters()).keys()
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    theirs.load_state_dict({name: value.detach() for name, value in names.items()}, strict=False)
    generator = torch.Generator().manual_seed(1)
    x, upstream = (torch.randn(2, TIME, D, generator=generator) for _ in range(2))
    results = []
    for layer in (ours, run):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, upstream)))
    (y, dx), (want, want_dx) = results
    assert distance(y, want) <= TOLERANCE
    assert distance(dx, want_dx) <= TOLERANCE


def test_mamba_is_transformers():
    pytest.importorskip("transformers")
    from transformers.models.mamba.configuration_mamba import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    ours = randomised(Mamba(D, d_state=5, d_conv=3))
    config = MambaConfig(hidden_size=D, state_size=5, conv_kernel=3, num_hidden_layers=1)
    theirs = MambaMixer(config, layer_idx=0).eval()
    names = mamba_names(ours) | {"dt_proj.bias": ours.dt_bias}
    assert_same(ours, theirs, names, theirs)


def test_mamba_with_norms_is_jambas():
    pytest.importorskip("transformers")
    from transformers.models.jamba.configuration_jamba import JambaConfig
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    ours = randomised(Mamba(D, d_state=5, norms=True))
    config = JambaConfig(hidden_size=D, mamba_d_state=5, mamba_dt_rank=2, mamba_d_conv=4, num_hidden_layers=1)
    theirs = JambaMambaMixer(config, layer_idx=0).eval()
    norms = {f"{name}_layernorm.weight": norm.weight for name, norm in zip("dt b c".split(), ours.norms, strict=True)}
    assert_same(ours, theirs, mamba_names(ours) | norms | {"dt_proj.bias": ours.dt_bias}, theirs)


def mamba_names(ours: Mamba) -> dict:
    return {
        "in_proj.weight": ours.inputs.weight,
        "conv1d.weight": rearrange(ours.conv.weight, "d w -> d 1 w"),
        "conv1d.bias": ours.conv.bias,
        "x_proj.weight": ours.select.weight,
        "dt_proj.weight": ours.dt.weight,
        "A_log": ours.A_log,
        "D": ours.D,
        "out_proj.weight": ours.out.weight,
    }


def mamba2_names(ours: Mamba2) -> dict:
    norm = {} if ours.norm is None else {"norm.weight": ours.norm}
    return norm | {
        "in_proj.weight": ours.inputs.weight,
        "conv1d.weight": rearrange(ours.conv.weight, "d w -> d 1 w"),
        "conv1d.bias": ours.conv.bias,
        "dt_bias": ours.dt_bias,
        "A_log": ours.A_log,
        "D": ours.D,
        "out_proj.weight": ours.out.weight,
    }


def test_mamba2_is_transformers():
    pytest.importorskip("transformers")
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    ours = randomised(Mamba2(D, head_dim=8, d_state=6, n_groups=2))
    config = Mamba2Config(
        hidden_size=D, num_heads=8, head_dim=8, state_size=6, n_groups=2, chunk_size=16, num_hidden_layers=1
    )  # fmt: skip
    theirs = Mamba2Mixer(config, layer_idx=0).eval()
    assert_same(ours, theirs, mamba2_names(ours), theirs)


@pytest.mark.parametrize("norm", ["before_gate", "none"])
def test_mamba2_with_other_norms_is_falcon_h1s(norm):
    pytest.importorskip("transformers")
    from transformers.models.falcon_h1.configuration_falcon_h1 import FalconH1Config
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer

    ours = randomised(Mamba2(D, head_dim=8, n_heads=6, d_state=6, n_groups=2, norm=norm))
    config = FalconH1Config(
        hidden_size=D, mamba_d_ssm=48, mamba_n_heads=6, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=6,
        mamba_chunk_size=16, mamba_rms_norm=norm != "none", mamba_norm_before_gate=norm == "before_gate",
        num_hidden_layers=1, rms_norm_eps=1e-5,
    )  # fmt: skip
    theirs = FalconH1Mixer(config, layer_idx=0).eval()
    theirs.register_buffer("mup_vector", torch.ones(1))  # the model sets it, from multipliers that are all 1 here
    assert_same(ours, theirs, mamba2_names(ours), theirs)


def test_mamba2_with_bounded_steps_is_nemotron_hs():
    pytest.importorskip("transformers")
    from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    ours = randomised(Mamba2(D, head_dim=8, n_heads=6, d_state=6, n_groups=2, dt_min=0.05))
    config = NemotronHConfig(
        hidden_size=D, mamba_num_heads=6, mamba_head_dim=8, n_groups=2, ssm_state_size=6, chunk_size=16,
        time_step_min=0.05, layer_norm_epsilon=1e-5,
    )  # fmt: skip
    theirs = NemotronHMamba2Mixer(config, layer_idx=0).eval()
    assert_same(ours, theirs, mamba2_names(ours), theirs)


def test_rglru_is_recurrent_gemmas():
    pytest.importorskip("transformers")
    from transformers.models.recurrent_gemma.configuration_recurrent_gemma import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    ours = randomised(RGLRU(D, n_blocks=4, width=24))
    config = RecurrentGemmaConfig(hidden_size=D, num_attention_heads=4, lru_width=24, num_hidden_layers=1)
    theirs = RecurrentGemmaRecurrentBlock(config, layer_idx=0).eval()
    (x, y), (x_bias, y_bias) = ours.inputs.weight.chunk(2), ours.inputs.bias.chunk(2)
    enter, keep = rearrange(ours.gates.weight, "(g two o) i -> two g i o", g=4, two=2)
    enter_bias, keep_bias = rearrange(ours.gates.bias, "(g two o) -> two g o", g=4, two=2)
    names = {"linear_x.weight": x, "linear_x.bias": x_bias, "linear_y.weight": y, "linear_y.bias": y_bias}
    names |= {"linear_out.weight": ours.out.weight, "linear_out.bias": ours.out.bias}
    names |= {"conv_1d.weight": rearrange(ours.conv.weight, "d w -> d 1 w"), "conv_1d.bias": ours.conv.bias}
    names |= {"rg_lru.recurrent_param": ours.decay}
    names |= {"rg_lru.input_gate_weight": enter, "rg_lru.input_gate_bias": enter_bias}
    names |= {"rg_lru.recurrent_gate_weight": keep, "rg_lru.recurrent_gate_bias": keep_bias}
    where = torch.arange(TIME)[None]
    assert_same(ours, theirs, names, lambda x: theirs(x, where, None, use_cache=False)[0])


def test_gated_short_conv_is_lfm2s():
    pytest.importorskip("transformers")
    from transformers.models.lfm2.configuration_lfm2 import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    ours = randomised(GatedShortConv(D))
    config = Lfm2Config(hidden_size=D, conv_L_cache=3, conv_bias=False, num_hidden_layers=1, layer_types=["conv"])
    theirs = Lfm2ShortConv(config, layer_idx=0).eval()
    names = {"in_proj.weight": ours.inputs.weight, "out_proj.weight": ours.out.weight}
    names |= {"conv.weight": rearrange(ours.conv.weight, "d w -> d 1 w")}
    assert_same(ours, theirs, names, theirs)
