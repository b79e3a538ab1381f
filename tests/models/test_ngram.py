"""N-gram heads read what the plain definition says, in one pass, in pieces, and token by token."""

import pytest
import torch

from hybridlab.models.parts.ngram import Found, NgramHeads
from hybridlab.packing import Packing

ORDERS = (1, 2, 3, 4, 6, 8)


def definition(document: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """For every position and order: the token that followed the most recent match, and how many latest ones agree."""
    tokens, runs = [], []
    for t in range(len(document)):
        now = [document[max(0, t - n + 1) : t + 1] for n in ORDERS]
        tokens.append([0] * len(ORDERS))
        runs.append([0] * len(ORDERS))
        for i, n in enumerate(ORDERS):
            starts = range(n - 1, t) if t >= n - 1 else []
            matches = [j for j in starts if document[j - n + 1 : j + 1] == now[i]]
            if matches:
                follow = [document[j + 1] for j in reversed(matches)]
                tokens[t][i] = follow[0]
                runs[t][i] = next((k for k, token in enumerate(follow) if token != follow[0]), len(follow))
    return tokens, runs


@pytest.fixture
def heads():
    return NgramHeads(8, n_heads=3, orders=ORDERS)


@pytest.fixture(params=range(8))
def documents(request):
    g = torch.Generator().manual_seed(request.param)
    lengths = torch.randint(0, 40, (4,), generator=g).tolist()
    return [torch.randint(0, 2 + request.param % 3, (n,), generator=g) for n in lengths]


def same(got: Found, want: Found) -> None:
    assert torch.equal(got.token, want.token) and torch.equal(got.level, want.level)


def truth(heads: NgramHeads, documents: list[torch.Tensor]) -> Found:
    per_document = [definition(d.tolist()) for d in documents]
    tokens, runs = ([row for part in side for row in part] for side in zip(*per_document, strict=True))
    return heads._choose(torch.tensor(tokens), torch.tensor(runs))


def test_packed_documents_read_what_the_definition_reads(heads, documents):
    packing = Packing.from_lengths([len(d) for d in documents])
    found = heads.find(torch.cat(documents)[None], packing)
    same(Found(found.token[0], found.level[0]), truth(heads, documents))
    assert (found.level > 0).any()


def test_pieces_and_steps_read_what_one_pass_reads(heads, documents):
    want = truth(heads, documents)
    cuts = [len(d) // 2 for d in documents]
    state, seen = heads.init_state(4, 64), [[] for _ in documents]
    found, state = heads.prefill(
        torch.cat([d[:cut] for d, cut in zip(documents, cuts, strict=True)])[None], state, Packing.from_lengths(cuts)
    )
    for row, part in enumerate(found.token[0].split(cuts)):
        seen[row].append(part)
    for row, (d, cut) in enumerate(zip(documents, cuts, strict=True)):
        own = type(state)(*(part[row : row + 1].clone() for part in state))
        for t in range(cut, len(d)):
            found, own = heads.step(d[t : t + 1], own)
            seen[row].append(found.token)
    assert torch.equal(torch.cat([torch.cat(parts) for parts in seen]), want.token)


def test_more_tokens_than_the_state_keeps_are_refused(heads):
    with pytest.raises(ValueError, match="max_len=3 tokens, but 4"):
        heads.prefill(torch.zeros(1, 4, dtype=torch.long), heads.init_state(1, 3))


@pytest.mark.parametrize("orders, n_heads", [((2, 4), 1), ((1, 3), 1), ((), 1), ((1, 2, 2), 1), ((1, 2), 3), ((1,), 0)])
def test_orders_that_cannot_be_chained_and_heads_with_nothing_to_read_are_refused(orders, n_heads):
    with pytest.raises(ValueError, match="orders"):
        NgramHeads(8, orders=orders, n_heads=n_heads)


def test_heads_read_different_tokens_longest_order_first(heads):
    tokens = torch.tensor([[1, 2, 9, 3, 2, 8, 1, 2]])  # after (1, 2) came 9; after 2 alone, lately, 8
    found = heads.find(tokens)
    assert found.token[0, -1].tolist() == [9, 8, 0]
    assert found.level[0, -1].tolist() == [1 + 4 * 1, 1 + 4 * 0, 0]


def test_what_a_head_reads_changes_the_logits_of_that_token_only(heads):
    tokens = torch.tensor([[5, 6, 7, 5]])
    found = heads.find(tokens)
    torch.nn.init.ones_(heads.level_logit)
    logits = heads.leave(torch.zeros(1, 4, 9), torch.zeros(1, 4, 8), found)
    assert logits[0, 3].nonzero().flatten().tolist() == [6] and not logits[0, :3].any()
