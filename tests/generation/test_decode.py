"""Prefill in chunks and steps make the tokens that the whole model would make, for any prompts side by side."""

import pytest
import torch

from hybridlab.generation.decode import complete, generate, prefill
from hybridlab.generation.sampling import Sampler
from hybridlab.tokenizer import Tokenizer

GREEDY = Sampler(temperature=0)
PROMPTS = [list(range(1, n + 1)) for n in (1, 7, 30, 8, 16)]


def together(model, prompts, tokens=12, sampler=GREEDY, stop=None) -> list[list[int]]:
    made = [[] for _ in prompts]
    for step in generate(model, prompts, tokens, sampler, stop=stop):
        for row, token in step:
            made[row].append(token)
    return made


@pytest.mark.parametrize("chunk", [1, 3, 8, 512])
def test_chunked_prefill_of_unequal_prompts_equals_forward_of_each(model, chunk):
    model = model.double()
    logits, state = prefill(model, PROMPTS, 40, chunk)
    following, _ = model.step(torch.full([len(PROMPTS)], 9), state)
    for i, prompt in enumerate(PROMPTS):
        expected = model(torch.tensor([[*prompt, 9]])).logits[0, -2:]
        assert (torch.stack([logits[i], following[i]]) - expected).abs().max() < 1e-9


def test_greedy_tokens_are_those_of_recomputing_from_scratch(model):
    for prompt, made in zip(PROMPTS, together(model, PROMPTS), strict=True):
        assert made == from_scratch(model, prompt, 12)


@torch.no_grad()
def from_scratch(model, prompt, tokens) -> list[int]:
    row = list(prompt)
    for _ in range(tokens):
        row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(prompt) :]


def test_a_sample_does_not_depend_on_its_companions(model):
    sampler = Sampler(temperature=1.0, top_p=0.9, seed=5)
    beside = together(model, PROMPTS, sampler=sampler)
    assert beside == [together(model, [prompt], sampler=sampler)[0] for prompt in PROMPTS]
    twice = together(model, [PROMPTS[1], PROMPTS[1]], sampler=sampler)
    assert twice[0] == beside[1] != twice[1]


def test_a_row_that_stops_leaves_the_others_as_they_were(model):
    sampler = Sampler(temperature=1.5, seed=1)
    free = together(model, PROMPTS, 30, sampler)
    stop = free[2][4]
    for row, made in zip(free, together(model, PROMPTS, 30, sampler, stop), strict=True):
        assert made == (row[: row.index(stop)] if stop in row else row)
    assert stop in free[2] and any(stop not in row for row in free)


def test_empty_prompts_are_refused_and_an_empty_text_starts_at_the_document_start(model):
    with pytest.raises(ValueError, match=r"\[2, 0\]"):
        prefill(model, [[1, 2], []], 10)
    tokenizer = Tokenizer.from_bytes()
    empty, other = complete(model, tokenizer, ["", b"\xff\xfe"], 5, GREEDY)
    assert empty == tokenizer.decode(together(model, [[tokenizer.bos]], 5, stop=tokenizer.bos)[0])
    assert isinstance(other, str)
