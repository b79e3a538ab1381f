import numpy as np
import pytest
import torch

from hybridlab.data.batch import Rows

BOS = 9


def document_lengths(batch):
    return batch.packing.offsets.diff().tolist()


def stream(n=101, seed=0):
    tokens = np.random.default_rng(seed).integers(0, BOS + 1, n).astype(np.uint16)
    tokens[0] = BOS
    return tokens


@pytest.mark.parametrize("cuts", [[], [50], [3, 4, 64]])
@pytest.mark.parametrize("time", [1, 7, 100, 150])
def test_validation_rows_predict_every_token_but_the_first_exactly_once(cuts, time):
    tokens = stream()
    rows = Rows(np.split(tokens, cuts), time, BOS, whole=True)
    batch = rows.batch(np.arange(rows.n_rows))
    scored = batch.targets != -100
    assert batch.targets[scored].tolist() == tokens[1:].tolist()
    assert batch.tokens[scored].tolist() == tokens[:-1].tolist()
    assert batch.tokens.flatten()[: len(tokens)].tolist() == tokens[: rows.n_rows * time].tolist()
    assert (batch.tokens.flatten()[len(tokens) :] == BOS).all()


@pytest.mark.parametrize("time", [1, 7, 100])
def test_training_rows_are_all_full_and_leave_out_the_rest(time):
    tokens = stream()
    rows = Rows([tokens], time, BOS, whole=False)
    assert rows.n_rows == 100 // time
    batch = rows.batch(np.arange(rows.n_rows))
    assert batch.targets.flatten().tolist() == tokens[1 : rows.n_rows * time + 1].tolist()
    assert batch.tokens.dtype == batch.targets.dtype == batch.rows.dtype == torch.int64


def test_a_batch_holds_the_rows_asked_for_in_that_order():
    rows = Rows(np.split(stream(), [20, 33]), 8, BOS, whole=False)
    whole, some = rows.batch(np.arange(12)), rows.batch(np.array([7, 0, 3, 7]))
    assert torch.equal(some.tokens, whole.tokens[[7, 0, 3, 7]]) and torch.equal(
        some.targets, whole.targets[[7, 0, 3, 7]]
    )
    assert some.rows.tolist() == [7, 0, 3, 7]


def test_documents_begin_at_their_first_token_and_at_every_row_start():
    tokens = np.array([BOS, 1, 2, BOS, 3, 4, 5, 6, BOS, 7, 8], np.uint16)
    batch = Rows([tokens], 4, BOS, whole=True).batch(np.array([0, 1, 2]))
    assert document_lengths(batch) == [3, 1, 4, 3, 1]
    assert batch.packing.longest == 4 and batch.tokens[2].tolist() == [BOS, 7, 8, BOS]
    assert batch.targets[2].tolist() == [7, 8, -100, -100]
