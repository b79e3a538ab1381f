import pytest
import torch

from hybridlab.data.recall import Recall


def corpus(tmp_path, **options):
    sizes = {"vocab_size": 32, "seq_len": 24, "batch_size": 4, "n_pairs": 5, "n_queries": 6} | options
    return Recall(**sizes).prepare(tmp_path)


def test_every_answer_follows_from_the_pairs_and_nothing_else_is_scored(tmp_path):
    batch = corpus(tmp_path).rows("train", range(200))
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        pairs = dict(zip(tokens[0:10:2], tokens[1:10:2], strict=True))
        asked = [i for i, target in enumerate(targets) if target != -100]
        assert len(pairs) == 5 and len(asked) == 6 and min(asked) >= 10
        assert all(targets[i] == pairs[tokens[i]] for i in asked)
        assert all(tokens[i] == 0 for i in range(10, 24) if i not in asked)
        assert all(1 <= key <= 15 for key in pairs) and all(16 <= value <= 31 for value in pairs.values())
    assert batch.packing.offsets.tolist() == list(range(0, 200 * 24 + 1, 24))


def test_all_keys_values_and_places_occur_evenly(tmp_path):
    batch = corpus(tmp_path).rows("train", range(3000))
    for drawn, low, high in ((batch.tokens[:, 0], 1, 15), (batch.tokens[:, 1], 16, 31)):
        counts = torch.bincount(drawn, minlength=high + 1)[low : high + 1] / 3000 * (high - low + 1)
        assert 0.7 < counts.min() and counts.max() < 1.3
    places = (batch.targets != -100).float().mean(0)[10:]
    assert (places - 6 / 14).abs().max() < 0.05


def test_a_row_depends_on_seed_split_and_number_alone(tmp_path):
    rows = corpus(tmp_path).rows("train", range(50))
    one = corpus(tmp_path).rows("train", [17])
    assert torch.equal(one.tokens[0], rows.tokens[17]) and torch.equal(one.targets[0], rows.targets[17])
    assert len({tuple(row) for row in rows.tokens.tolist()}) == 50
    assert not torch.equal(corpus(tmp_path).rows("valid", range(50)).tokens, rows.tokens)
    other = corpus(tmp_path, seed=1)
    assert not torch.equal(other.rows("train", range(50)).tokens, rows.tokens)
    assert other.fingerprint != corpus(tmp_path).fingerprint == corpus(tmp_path).fingerprint


def test_validation_may_be_longer_and_rows_end_where_they_end(tmp_path):
    data = corpus(tmp_path, valid_seq_len=40, train_rows=9, valid_rows=3)
    assert data.rows("valid", [2]).tokens.shape == (1, 40)
    assert (data.n_rows("train"), data.n_rows("valid")) == (9, 3)
    with pytest.raises(IndexError, match="0 to 8"):
        data.rows("train", [9])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_pairs": 16, "seq_len": 99}, "vocab_size=32 has 15 keys, fewer than n_pairs=16"),
        ({"n_queries": 15}, "rows of 24 tokens cannot hold 5 pairs and 15 queries"),
        ({"valid_seq_len": 15}, "rows of 15 tokens"),
        ({"n_pairs": 0}, "n_pairs=0"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"batch_size": -1}, "batch_size=-1"),
    ],
)
def test_what_cannot_be_is_refused_by_value(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        corpus(tmp_path, **options)
