"""The laws, for whole models: every way of putting blocks together."""

import re
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridlab.models.block import Block, Parallel
from hybridlab.models.ffn.gated import SwiGLU
from hybridlab.models.ffn.moe import MoE
from hybridlab.models.lm import HybridLM
from hybridlab.models.mixer import map_state, state_tensors
from hybridlab.models.mixers.attention import Attention
from hybridlab.models.mixers.gated_delta import GatedDelta
from hybridlab.models.mixers.linear_attention import LinearAttention
from hybridlab.models.mixers.mamba import Mamba
from hybridlab.models.mixers.mamba2 import Mamba2
from hybridlab.models.mixers.retention import Retention
from hybridlab.models.parts.ngram import NgramHeads
from hybridlab.packing import Packing

D, VOCAB, TIME = 32, 50, 21
attention = partial(Attention, n_heads=4, n_kv_heads=2)
sliding = partial(Attention, n_heads=4, window=5)
mamba2 = partial(Mamba2, head_dim=16, d_state=16)
swiglu = partial(SwiGLU, d_hidden=48)
moe = partial(MoE, n_experts=4, top_k=2, d_hidden=24)
block = partial(Block, ffn=swiglu)
MODELS = {
    "list": dict(
        pattern=["ssm", "ssm", "attn"],
        n_layers=4,
        blocks={"ssm": partial(block, mixer=mamba2), "attn": partial(block, mixer=attention)},
    ),
    "string": dict(
        pattern="ME*E",
        letters={"M": "ssm", "E": "moe", "*": "attn"},
        blocks={
            "ssm": partial(Block, mixer=mamba2),
            "moe": partial(Block, ffn=moe),
            "attn": partial(Block, mixer=sliding),
        },
        tied=True,
    ),
    "places": dict(
        pattern=["attn"],
        n_layers=3,
        blocks={"attn": partial(block, mixer=attention)},
        places={1: {"mixer": {"window": 4}}},
    ),
    "parallel": dict(
        pattern=["both"],
        n_layers=2,
        blocks={
            "both": partial(
                block,
                mixer=partial(Parallel, mixers={"attn": attention, "ssm": mamba2}, combine="normalised"),
                norm="sandwich",
            )
        },
    ),
    "shared": dict(
        pattern=["ssm", "attn", "ssm", "attn"],
        blocks={"ssm": partial(block, mixer=partial(Mamba, d_state=4)), "attn": partial(block, mixer=attention)},
        shared={"global": [1, 3]},
    ),
    "ngram": dict(
        pattern=["ssm", "attn"],
        blocks={"ssm": partial(block, mixer=mamba2), "attn": partial(block, mixer=sliding)},
        ngram=partial(NgramHeads, n_heads=2),
    ),
    "linear": dict(
        pattern=["delta", "ret", "lin"],
        blocks={
            "delta": partial(block, mixer=partial(GatedDelta, n_heads=2)),
            "ret": partial(block, mixer=partial(Retention, n_heads=2), norm="post"),
            "lin": partial(block, mixer=partial(LinearAttention, n_heads=2), norm="output"),
        },
    ),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> HybridLM:
    torch.manual_seed(0)
    return HybridLM(vocab_size=VOCAB, d_model=D, **MODELS[name]).to(dtype)


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def tokens():
    return torch.randint(VOCAB, (2, TIME), generator=torch.Generator().manual_seed(1))


def close(got, want, tolerance):
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_future_is_invisible(name, tokens, dtype):
    model = build(name, dtype)
    before = model(tokens).logits
    for t in (1, 7, TIME - 1):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        after = model(changed).logits
        if "moe" in MODELS[name]["blocks"]:  # group sizes of experts move matmul rows within the dtype's budget
            close(after[:, :t], before[:, :t], 4 * torch.finfo(dtype).eps)
        else:
            assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("cuts", [[0], [1, 2], [8, 13], [TIME]])
def test_prefill_split_anywhere_then_step_equals_forward(name, tokens, dtype, tolerance, cuts):
    model = build(name, dtype)
    state, logits = model.init_state(2, TIME), []
    for start, end in zip([0, *cuts[:-1]], cuts, strict=True):
        part, state = model.prefill(tokens[:, start:end], state)
        logits.append(part)
    for t in range(cuts[-1], TIME):
        part, state = model.step(tokens[:, t], state)
        logits.append(part[:, None])
    close(torch.cat(logits, 1), model(tokens).logits, tolerance)


@torch.no_grad()
def test_prompts_of_unequal_length_prefill_together(name, tokens):
    model = build(name)
    lengths = [5, 0, 13, 1]
    docs = [tokens[0, :5], tokens[0, :0], tokens[1, :13], tokens[0, 5:6]]
    state = model.init_state(4, TIME)
    packed = Packing.from_lengths(lengths)
    logits, state = model.prefill(torch.cat(docs)[None], state, packed)
    logits_next, _ = model.step(torch.arange(4), map_state(torch.clone, state))
    for i, doc in enumerate(docs):
        alone = model.init_state(1, TIME)
        want, alone = model.prefill(doc[None], alone)
        if len(doc):
            close(logits[:, packed.offsets[i] : packed.offsets[i + 1]], want, 1e-9)
        close(logits_next[i : i + 1], model.step(torch.tensor([i]), alone)[0], 1e-9)


def test_packed_documents_do_not_see_each_other(name, tokens):
    """Rows of 21 tokens; documents cut the second row; every row start begins a document."""
    model = build(name)
    lengths = [TIME, 4, 1, 0, 16]
    packing = Packing.from_lengths(lengths)
    seen = []
    model.embed.register_forward_hook(lambda module, args, y: seen.append(y.requires_grad_()) or y.retain_grad())
    logits = model(tokens, packing).logits.flatten(0, 1)
    docs, parts = tokens.flatten().split(lengths), logits.split(lengths)
    exact = "moe" not in MODELS[name]["blocks"]
    for i, (doc, part) in enumerate(zip(docs, parts, strict=True)):
        if not len(doc):
            continue
        close(part, model(doc[None]).logits[0], 1e-6)
        seen[0].grad = None
        (part * torch.linspace(-1, 1, part.numel()).view_as(part)).sum().backward(retain_graph=True)
        reach = seen[0].grad.flatten(0, 1).split(lengths)
        assert all((reach[j] == 0).all() for j in range(len(docs)) if j != i and len(docs[j]))
        assert (reach[i] != 0).any()
    changed = tokens.flatten().clone()
    changed[TIME + 2] = (changed[TIME + 2] + 1) % VOCAB
    others = model(changed.view(2, TIME), packing).logits.flatten(0, 1).split(lengths)
    for j in (0, 2, 4):
        assert torch.equal(others[j], parts[j]) if exact else ((others[j] - parts[j]).abs().max() < 1e-12)
    assert not torch.equal(others[1], parts[1])


def test_a_packing_that_does_not_cover_the_tokens_is_refused(name, tokens):
    with pytest.raises(ValueError, match="packing covers 20 tokens"):
        build(name)(tokens, Packing.from_lengths([20]))


@torch.no_grad()
def test_a_model_built_on_meta_comes_to_life_as_if_built_here(name):
    with torch.device("meta"):
        model = HybridLM(vocab_size=VOCAB, d_model=D, **MODELS[name])
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-1)
    torch.manual_seed(0)
    model.reset_parameters()
    torch.manual_seed(0)
    here = HybridLM(vocab_size=VOCAB, d_model=D, **MODELS[name])
    torch.manual_seed(0)
    here.reset_parameters()
    for key, value in here.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@torch.no_grad()
def test_what_is_reported_is_what_is(name):
    model = build(name, torch.float32)
    state = model.init_state(1, TIME, dtype=torch.bfloat16)
    held = sum(t.numel() * t.element_size() for t in state_tensors(state))
    assert held == model.state_bytes(TIME, torch.bfloat16)
    rows = model.table(TIME)
    around = [part for part in (model.embed, model.norm, model.head, model.ngram) if part is not None]
    around = sum(p.numel() for part in around for p in part.parameters())
    total, active = model.n_params()
    assert sum(row.params for row in rows) + around == total == sum(p.numel() for p in model.parameters())
    assert active < total if "moe" in model.layout else active == total
    history = 0 if model.ngram is None else 8 * TIME + 8
    assert sum(row.state_bytes for row in rows) + history == held
    heads = 0 if model.ngram is None else model.ngram.flops(TIME)
    assert sum(row.flops for row in rows) * TIME + 2 * VOCAB * D * TIME + heads == pytest.approx(model.flops(TIME))


@torch.no_grad()
def test_the_head_is_counted_exactly():
    blocks = {"ffn": partial(Block, ffn=swiglu)}
    model = HybridLM(vocab_size=VOCAB, d_model=D, pattern=["ffn"], n_layers=2, blocks=blocks)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, TIME, dtype=torch.long))
    assert counter.get_total_flops() == model.flops(TIME)


def test_shared_places_hold_one_set_of_parameters_and_two_states():
    model = build("shared")
    assert model.by_place()[1] is model.by_place()[3]
    assert not any(key.startswith("layers.3.") for key in model.state_dict())
    assert len(model.init_state(1, 4)) == 4


def test_places_change_one_layer_only():
    model = build("places")
    assert [layer.mixer.window for layer in model.by_place()] == [None, 4, None]


def test_tied_embeddings_are_one_matrix():
    assert build("string").head is None
    assert build("list").head is not None


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(places={1: {"mixer": {"window": 3}}}, shared={"s": [0, 1]}), "share their parameters"),
        (dict(blocks={"attn": partial(Block)}), "at least one of them"),
        (dict(blocks={"attn": partial(block, mixer=partial(Attention, n_heads=5))}), "n_heads=5"),
        (dict(blocks={"attn": partial(block, mixer=attention, norm="peri")}), "peri"),
    ],
)
def test_a_model_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        HybridLM(vocab_size=VOCAB, d_model=D, **{**MODELS["places"], "places": None, **changes})


@torch.no_grad()
@pytest.mark.parametrize("combine", ["sum", "mean", "normalised"])
def test_parallel_mixers_combine_as_they_say(combine):
    torch.manual_seed(0)
    mixers = {"a": attention, "b": mamba2}
    both = Parallel(D, mixers=mixers, combine=combine, scales={"b": 0.5}).double()
    x = torch.randn(2, 9, D, dtype=torch.float64)
    a, b = (mixer(x) for mixer in both.mixers.values())
    if combine == "normalised":
        a, b = (y / y.square().mean(-1, keepdim=True).add(1e-6).sqrt() for y in (a, b))
    want = (a + 0.5 * b) / (1 if combine == "sum" else 2)
    close(both(x), want, 1e-12)


def test_own_parameters_stay_float32_when_a_model_goes_to_bfloat16(name):
    model = build(name, torch.bfloat16)
    narrow = ("embed.weight", "head.weight")
    for module_name, module in model.named_modules():
        for key, p in module.named_parameters(prefix=module_name, recurse=False):
            matrix = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Experts" or key in narrow
            assert p.dtype == (torch.bfloat16 if matrix else torch.float32), key
    logits = model(torch.zeros(1, 5, dtype=torch.long)).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
