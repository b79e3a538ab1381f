import random

import numpy as np
import pytest
import torch

from hybridlab.data.order import UNBOUNDED, mix, order


@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_every_epoch_is_a_permutation_of_its_own(n_rows):
    epochs = order(3, n_rows, range(3 * n_rows)).reshape(3, n_rows)
    assert all(sorted(epoch.tolist()) == list(range(n_rows)) for epoch in epochs)
    assert n_rows < 16 or len({tuple(epoch.tolist()) for epoch in epochs}) == 3


def test_a_place_gets_its_row_whatever_else_is_asked():
    whole = order(7, 1000, range(5000))
    places = random.Random(0).sample(range(5000), 300)
    assert torch.equal(order(7, 1000, torch.tensor(places)), whole[places])
    assert order(7, 1000, [places[0]]).tolist() == [whole[places[0]].item()]
    assert not torch.equal(order(8, 1000, range(1000)), whole[:1000])


def test_the_order_is_the_one_of_every_version_and_machine():
    """A changed order breaks every resume, so these are written down."""
    assert order(0, 10, range(10)).tolist() == [0, 1, 2, 9, 8, 3, 4, 7, 6, 5]


def test_a_shuffle_looks_like_one():
    rows = order(0, 4096, range(4096)).numpy()
    assert abs(np.corrcoef(rows, np.arange(4096))[0, 1]) < 0.05
    steps = np.diff(rows)
    assert (steps == 1).mean() < 0.01 and len(np.unique(steps)) > 2000
    bits = mix(0, np.arange(4096)) & np.uint64(1)
    assert 0.45 < bits.mean() < 0.55


def test_streams_stay_in_order_and_impossible_places_are_refused():
    assert order(0, UNBOUNDED, [5, 9]).tolist() == [5, 9]
    with pytest.raises(ValueError, match="n_rows=0"):
        order(0, 0, [0])
    with pytest.raises(ValueError, match="-1"):
        order(0, 5, [-1])
