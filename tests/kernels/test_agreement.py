"""Law 4: every version of every op equals its definition in float64, as closely as its dtype allows."""

import pytest
import torch

from hybridlab.kernels.ops import OPS

QUICK = ("tiny", "single", "packed")  # in Triton's interpreter
RUNS = [
    pytest.param(
        op,
        version,
        case,
        dtype,
        id=f"{op.name}-{version}-{case}-{str(dtype)[6:]}",
        marks=pytest.mark.long if version == "triton" and case not in QUICK else (),
    )  # fmt: skip
    for op in OPS
    for version in op.versions
    for case in op.cases
    if case != "real"
    for dtype in (torch.float32, torch.bfloat16)
]
SLACK = 2.0  # a version may lose twice what float32 arithmetic and one final rounding lose
CEILING = {torch.float32: (1e-5, 2e-5), torch.bfloat16: (5e-3, 1e-2)}  # of outputs and gradients; no budget exceeds it


@pytest.mark.parametrize("op, version, case, dtype", RUNS)
def test_version_agrees_with_definition_within_the_budget_of_its_dtype(lab, op, version, case, dtype):
    args = lab.make(op, op.cases[case], dtype)
    if why := op.unavailable(version, **args):
        pytest.skip(why)
    upstream = lab.draw_upstream(op, args, seed=1)
    truth = lab.evaluate(op.reference, lab.cast(args, torch.float64), upstream)
    ideal = lab.evaluate(op.reference, lab.cast(args, torch.float32), upstream)
    ours = lab.evaluate(op.get(version), args, upstream, strange=True)
    assert ours.keys() == truth.keys()
    for name in truth:
        once = lab.error(ideal[name].to(dtype).double(), truth[name])
        budget = min(max(SLACK * once, torch.finfo(dtype).eps / 2), CEILING[dtype][name.startswith("d")])
        lost = lab.error(ours[name], truth[name])
        assert lost <= budget, f"{name}: relative error {lost:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_outputs_have_the_dtypes_promised(lab, op):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        args = lab.make(op, op.cases["tiny"], dtype)
        for version in ("reference", *op.versions):
            if not op.unavailable(version, **args):
                y, *states = op(**args, version=version)
                assert y.dtype == dtype
                assert all(s.dtype == torch.promote_types(dtype, torch.float32) for s in states)
