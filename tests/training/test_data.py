from types import SimpleNamespace

import pytest
import torch

from hybridlab.data.order import order
from hybridlab.packing import Packing
from hybridlab.training import data
from hybridlab.training.data import StepLoader, part


def steps(tiny, workers=0, position=0, n=30):
    loader = StepLoader(tiny.corpus, seed=3, batch_size=4, steps=n, workers=workers)
    loader.trainer = SimpleNamespace(lightning_module=SimpleNamespace(step=position))
    return [batch.rows.tolist() for batch in loader]


def test_rows_follow_the_order_across_epochs_in_turn_or_in_processes(tiny):
    expected = order(3, 50, torch.arange(120)).reshape(30, 4).tolist()
    assert steps(tiny) == steps(tiny, workers=2) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_the_step_resumes_anywhere_and_draws_nothing_from_chance(tiny, workers):
    before = torch.get_rng_state()
    assert steps(tiny, workers, position=13) == steps(tiny)[13:]
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_share_the_batches_of_one_process(tiny, monkeypatch):
    alone, shares = steps(tiny), []
    for rank in range(2):
        monkeypatch.setattr(data, "rank_and_world", lambda rank=rank: (rank, 2))
        shares.append(steps(tiny))
    assert [a + b for a, b in zip(*shares, strict=True)] == alone


def test_a_part_of_a_batch_keeps_its_documents(tiny):
    batch = tiny.corpus.rows("train", torch.arange(5))
    for first, last in [(0, 5), (1, 2), (2, 5)]:
        found = part(batch, first, last, "cpu")
        starts = (batch.packing.positions == 0).reshape(5, -1)[first:last]
        expected = Packing.from_starts(starts)
        assert found.packing.offsets.tolist() == expected.offsets.tolist() and found.packing.longest == expected.longest
        assert torch.equal(found.tokens, batch.tokens[first:last]) and found.rows.tolist() == list(range(first, last))
