"""Every preset generates what its forward pass says, on random weights (RELIABILITY R16); whole in the long run."""

from pathlib import Path

import pytest
import torch

from hybridlab.config import build, compose
from hybridlab.generation.decode import generate, prefill
from hybridlab.generation.sampling import Sampler

PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "config").glob("*.yaml"))


@pytest.fixture(scope="module", params=PRESETS)
def preset(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["small", pytest.param("whole", marks=pytest.mark.long)])
def model(request, preset) -> torch.nn.Module:
    """As configured, or narrow and with the pattern once or twice: every kind of layer in a twentieth of the time."""
    if request.param == "small" and preset.endswith("_debug"):
        pytest.skip("the same kinds of layers as the preset it is a variant of")
    node = compose([f"+config={preset}", *["model.d_model=64", "data.vocab_size=300"] * (request.param == "small")])[
        "model"
    ]
    if request.param == "small" and not node.get("places") and not node.get("shared"):
        node["n_layers"] = max(len(node["pattern"]), 2)
    torch.manual_seed(0)
    return build(node, "model").eval()


@pytest.mark.parametrize("dtype, budget", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@torch.no_grad()
def test_prefill_split_anywhere_then_steps_equals_forward(model, dtype, budget):
    model = model.to(dtype)
    tokens = torch.randint(model.vocab_size, (2, 41))
    expected = model(tokens).logits
    state, found = model.init_state(2, 41), []
    for part in tokens[:, :37].split([17, 1, 19], 1):
        logits, state = model.prefill(part, state)
        found.append(logits)
    for token in tokens[:, 37:].unbind(1):
        logits, state = model.step(token, state)
        found.append(logits[:, None])
    assert (torch.cat(found, 1) - expected).abs().max() <= budget


@pytest.mark.parametrize("dtype, budget", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@torch.no_grad()
def test_prompts_of_unequal_length_prefill_together_as_alone(model, dtype, budget):
    model = model.to(dtype)
    prompts = [torch.randint(model.vocab_size, (n,)).tolist() for n in (1, 19, 8, 40)]
    logits, _ = prefill(model, prompts, 41, chunk=8)
    alone = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    assert (logits - alone).abs().max() <= budget


@torch.no_grad()
def test_64_greedy_tokens_equal_those_of_recomputing_from_scratch(model):
    """One forward pass over prompt and result holds every recomputation, for the future is invisible."""
    model = model.float()
    prompt = torch.randint(model.vocab_size, (9,)).tolist()
    made = [step[0][1] for step in generate(model, [prompt], 64, Sampler(temperature=0))]
    assert made == model(torch.tensor([prompt + made])).logits[0, 8:-1].argmax(-1).tolist()
