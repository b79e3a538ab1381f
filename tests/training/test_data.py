import pytest
import torch

from hybridlab.data.order import order
from hybridlab.packing import Packing
from hybridlab.training import data
from hybridlab.training.data import StepLoader, part


def steps(tiny, workers=0, position=0, n=30):
    loader = StepLoader(tiny.corpus, seed=3, batch_size=4, steps=n, workers=workers)
    loader.load_state_dict({"position": position})
    return loader, [batch.rows.tolist() for batch in loader]


def test_rows_follow_the_order_across_epochs_with_threads_or_processes(tiny):
    expected = order(3, 50, torch.arange(120)).reshape(30, 4).tolist()
    assert steps(tiny)[1] == steps(tiny, workers=2)[1] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_one_integer_resumes_anywhere(tiny, workers):
    loader, rows = steps(tiny, workers, position=13)
    assert rows == steps(tiny)[1][13:] and loader.state_dict() == {"position": 30} and len(loader) == 30


def test_position_counts_batches_handed_out_not_read_ahead(tiny):
    loader = StepLoader(tiny.corpus, seed=3, batch_size=4, steps=30)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    assert loader.state_dict() == {"position": 5}


def test_ranks_share_the_batches_of_one_process(tiny, monkeypatch):
    alone, shares = steps(tiny)[1], []
    for rank in range(2):
        monkeypatch.setattr(data, "rank_and_world", lambda rank=rank: (rank, 2))
        shares.append(steps(tiny)[1])
    assert [a + b for a, b in zip(*shares, strict=True)] == alone


def test_a_part_of_a_batch_keeps_its_documents(tiny):
    batch = tiny.corpus.rows("train", torch.arange(5))
    for first, last in [(0, 5), (1, 2), (2, 5)]:
        found = part(batch, first, last, "cpu")
        starts = (batch.packing.positions == 0).reshape(5, -1)[first:last]
        expected = Packing.from_starts(starts)
        assert found.packing.offsets.tolist() == expected.offsets.tolist() and found.packing.longest == expected.longest
        assert torch.equal(found.tokens, batch.tokens[first:last]) and found.rows.tolist() == list(range(first, last))
