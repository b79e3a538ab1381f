from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from hybridlab.training.optimizers import AdamW, Muon, orthogonalise, partition

MIXERS = Path(__file__).resolve().parents[2] / "configs" / "mixer"


def real_models():
    """A model with a block of every mixer that has a configuration."""
    from hybridlab.config import build
    from hybridlab.models.block import Block
    from hybridlab.models.ffn.moe import MoE
    from hybridlab.models.lm import HybridLM

    mixers = {path.stem: build(yaml.safe_load(path.read_text())) for path in sorted(MIXERS.glob("*.yaml"))}
    ffn = partial(MoE, n_experts=3, top_k=1, d_hidden=8, d_shared=8)
    blocks = {name: partial(Block, mixer=mixer, ffn=ffn) for name, mixer in mixers.items()}
    return HybridLM(vocab_size=11, d_model=64, pattern=list(blocks), blocks=blocks, tied=False)


def test_only_matrices_inside_layers_are_decayed_or_orthogonalised():
    matrices, rest = partition(real_models())
    assert matrices and not set(matrices) & set(rest)
    linear = {f"{n}.weight" for n, m in real_models().named_modules() if isinstance(m, nn.Linear) and n != "head"}
    stacked = {n for n in [*matrices, *rest] if n.endswith((".experts.up", ".experts.down"))}
    assert set(matrices) == linear | stacked
    for word in ("embed", "head", "norm", "router", "conv", "A_log", "dt_bias", "D", "decay", "bias"):
        assert not [n for n in matrices if word in n.split(".")[-1] or word in n.split(".")], word


def test_every_parameter_is_in_one_group_and_rest_is_not_decayed(tiny):
    for settings in (AdamW(tokens=1), Muon(tokens=1)):
        model = tiny.model(moe=True)
        optimizer = settings.build(model)
        ids = [id(p) for g in optimizer.param_groups for p in g["params"]]
        assert sorted(ids) == sorted(map(id, model.parameters()))
        assert [(g["name"], g["weight_decay"]) for g in optimizer.param_groups] == [("matrices", 0.1), ("rest", 0.0)]


def step(model, optimizer, times=3):
    for i in range(times):
        g = torch.Generator().manual_seed(i)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        optimizer.step()


def test_adamw_is_torchs(tiny):
    one, two = tiny.model(), tiny.model()
    two.load_state_dict(one.state_dict())
    matrices, rest = partition(two)
    groups = [
        {"params": list(matrices.values()), "weight_decay": 0.1},
        {"params": list(rest.values()), "weight_decay": 0.0},
    ]
    step(one, AdamW(tokens=1, lr=0.01).build(one))
    step(two, torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), foreach=False))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_muon_is_torchs_on_matrices():
    torch.manual_seed(0)
    one, two = nn.Sequential(nn.Linear(24, 16, bias=False)), nn.Sequential(nn.Linear(24, 16, bias=False))
    two.load_state_dict(one.state_dict())
    theirs = torch.optim.Muon(
        two.parameters(), lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    step(one, Muon(tokens=1, lr=0.01).build(one))
    step(two, theirs)
    # theirs multiplies in bfloat16; a step is about 0.002 per element
    torch.testing.assert_close(one[0].weight, two[0].weight, rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 1, 5)])
def test_muon_treats_stacked_experts_as_separate_matrices(shape):
    class Stack(nn.Module):
        def __init__(self, *tensors):
            super().__init__()
            self.experts = nn.ParameterList(tensors)

    torch.manual_seed(0)
    start, grad = torch.randn(shape), torch.randn(shape)
    whole, parts = Stack(start.clone()), Stack(*[t.clone()[None] for t in start])
    for model, grads in ((whole, [grad]), (parts, list(grad.unsqueeze(1)))):
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g.clone()
        Muon(tokens=1).build(model).step()
    torch.testing.assert_close(whole.experts[0], torch.cat(list(parts.experts)), rtol=0, atol=1e-6)


def test_orthogonalise_brings_singular_values_near_one_and_keeps_zero():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(3, 12, 40) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None], torch.zeros(1, 12, 40)])
    values = torch.linalg.svdvals(orthogonalise(x))
    assert values[:3].min() > 0.6 and values[:3].max() < 1.3 and not values[3].any()


def test_optimizer_state_is_float32_and_stays_so_through_a_checkpoint(tiny):
    for settings in (AdamW(tokens=1), Muon(tokens=1)):
        optimizer = settings.build(model := tiny.model(moe=True))
        step(model, optimizer, 1)
        fresh = settings.build(model)
        fresh.load_state_dict(optimizer.state_dict())
        assert {t.dtype for o in (optimizer, fresh) for s in o.state.values() for t in s.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("keys", "words"), [({"lr": 0}, "lr=0"), ({"momentum": 1.0}, "momentum=1.0"), ({"tokens": -1}, "tokens=-1")]
)
def test_optimizer_settings_out_of_range_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        Muon(**{"tokens": 1} | keys)
