"""R14: random sizes, layouts, packings and decays; the failing seed is in the test's name."""

import random

import pytest
import torch

from hybridlab.kernels.ops import OPS

SHORT, LONG = 30, 300
CEILING = {torch.float32: (1e-5, 2e-5), torch.float64: (1e-10, 1e-10)}
SEEDS = [pytest.param(s, marks=pytest.mark.long if s >= SHORT else ()) for s in range(LONG)]


def draw(op, rng):
    """A case of any op: sizes it does not know are ignored by taking only the names its tiny case has."""
    sizes = dict(
        batch=rng.choice([1, 1, 2, 3]),
        time=rng.choice([0, 1, 2, 3, rng.randint(1, 129), rng.randint(1, 129)]),
        groups=rng.choice([1, 2]),
        key=rng.choice([1, 3, 8]),
        value=rng.choice([1, 5, 8]),
        d_model=rng.choice([1, 3, 7, 16]),
        n=rng.choice([1, 3, 4]),
        width=rng.choice([1, 2, 4, 7]),
        decay=rng.choice([d for d in (None, "head", "time", "channel") if d != "head" or "constant" in op.cases]),
        state=rng.random() < 0.7,
        bias=rng.random() < 0.5,
        silu=rng.random() < 0.5,
        rest=rng.random() < 0.5,
        rows=tuple(rng.choice([0, 0, 1, 5, 33]) for _ in range(rng.randint(1, 5))),
        k=rng.choice([1, 4, 9]),
    )
    case = op.cases["tiny"] | {name: size for name, size in sizes.items() if name in op.cases["tiny"]}
    case |= {"low": rng.choice([-0.0, -1.0, -50.0]), "most": rng.choice([1.0, 2.0])}
    if "heads" in case:
        case["heads"] = case["groups"] * rng.choice([1, 3])
    if "docs" in case and rng.random() < 0.5:
        cuts = sorted(rng.choices(range(case["time"] + 1), k=rng.randint(0, 6)))
        case |= dict(batch=1, docs=tuple(b - a for a, b in zip([0, *cuts], [*cuts, case["time"]], strict=True)))
    return case


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_versions_agree_on_random_cases(lab, op, seed):
    rng = random.Random(seed)
    case, dtype, stride_0 = draw(op, rng), rng.choice(list(CEILING)), rng.random() < 0.3
    args = lab.make(op, case, dtype, seed=seed)
    if args.get("log_decay") is not None and rng.random() < 0.3:  # a sudden reset among slow decays
        args["log_decay"] = torch.where(torch.rand(args["log_decay"].shape) < 0.1, -50.0, args["log_decay"]).to(dtype)
    upstream = lab.draw_upstream(op, args, seed)
    if stride_0:
        upstream = [torch.ones((), dtype=torch.float64).expand(w.shape) for w in upstream]
    truth = lab.evaluate(op.reference, lab.cast(args, torch.float64), upstream)
    for version in op.versions:
        slow = version == "triton" and not torch.cuda.is_available()  # it is interpreted
        if op.unavailable(version, **args) or (slow and seed < SHORT and seed % 6):
            continue
        got = lab.evaluate(op.get(version), args, upstream, strange=not stride_0)
        for name in truth:
            bound = CEILING[dtype][name.startswith("d")]
            lost = lab.error(got[name], truth[name])
            assert lost <= bound, f"seed {seed}, {version}, {case}: {name} off by {lost:.2e}, bound {bound:.0e}"
