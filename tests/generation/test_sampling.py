"""What the sampler draws from, and that it draws with the right probabilities."""

import math

import pytest
import torch

from hybridlab.generation.sampling import Sampler

P = torch.tensor([0.02, 0.4, 0.08, 0.3, 0.2]).double()


def draws(n: int = 4000, p: torch.Tensor = P, **options) -> torch.Tensor:
    """Shares of each token among n draws."""
    sampler = Sampler(**options)
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    return sampler(p.log().expand(n, -1), generators).bincount(minlength=len(p)) / n


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"temperature": 1.0}, [0.02, 0.4, 0.08, 0.3, 0.2]),
        ({"temperature": 0.5}, [0.0004, 0.16, 0.0064, 0.09, 0.04]),
        ({"temperature": 1.0, "top_k": 2}, [0, 0.4, 0, 0.3, 0]),
        ({"temperature": 1.0, "top_k": 99}, [0.02, 0.4, 0.08, 0.3, 0.2]),
        ({"temperature": 1.0, "top_p": 0.69}, [0, 0.4, 0, 0.3, 0]),
        ({"temperature": 1.0, "top_p": 0.71}, [0, 0.4, 0, 0.3, 0.2]),
        ({"temperature": 1.0, "top_p": 1e-9}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "min_p": 0.49}, [0, 0.4, 0, 0.3, 0.2]),
        ({"temperature": 1.0, "min_p": 1.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 4, "top_p": 0.99, "min_p": 0.6}, [0, 0.4, 0, 0.3, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-6}, [0, 1, 0, 0, 0]),
    ],
)
def test_each_filter_leaves_the_distribution_it_promises(options, expected):
    expected = torch.tensor(expected) / sum(expected)
    shares = draws(**options)
    assert (shares[expected == 0] == 0).all()
    assert (shares - expected).abs().max() < 5 * math.sqrt(0.25 / 4000)


def test_tokens_of_probability_zero_are_never_drawn():
    p = torch.tensor([0.0, 1e-300, 0.5, 0.0, 0.5]).double()
    assert draws(p=p, temperature=1.0).nonzero().flatten().tolist() == [2, 4]
    assert draws(p=p, temperature=100.0)[[0, 3]].sum() == 0


def test_the_same_seed_and_prompt_draw_the_same_whatever_runs_beside():
    alone = Sampler(seed=3).generators([[1, 2]])[0].get_state()
    beside = Sampler(seed=3).generators([[5], [1, 2], [1, 2]])
    assert torch.equal(beside[1].get_state(), alone)
    assert not torch.equal(beside[2].get_state(), alone), "a repeated prompt gets another sample"
    assert not torch.equal(beside[0].get_state(), alone), "other prompts draw from other chances"
    assert not torch.equal(Sampler(seed=4).generators([[1, 2]])[0].get_state(), alone)


@pytest.mark.parametrize(
    "name, value",
    [("temperature", -1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", 0), ("top_p", 0.0),
     ("top_p", 1.1), ("top_p", math.nan), ("min_p", -0.1), ("min_p", 2.0), ("seed", -1), ("seed", 2**63)],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Sampler(**{name: value})


def test_nan_logits_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        Sampler()(torch.tensor([[0.0, math.nan]]), [torch.Generator()])
