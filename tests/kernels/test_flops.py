"""R25: what a version says that its matmuls execute is what they execute, padded chunks included."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridlab.kernels.ops import OPS


def product(_, a, b, **__) -> int:
    """a [batch, m, k], b [batch, k, n], given by shape"""
    return 2 * a[0] * a[1] * a[2] * b[2]


IN_PLACE = {torch.ops.aten.baddbmm_: product}  # torch counts only the form that returns a new tensor
RUNS = [
    pytest.param(op, name, case, id=f"{op.name}-{name}-{case}")
    for op in OPS
    for name, version in op.versions.items()
    if version.flops is not None and version.device is None
    for case in op.cases
]


@pytest.mark.parametrize("op, version, case", RUNS)
def test_executed_flops_are_those_that_a_version_reports(lab, op, version, case):
    args = lab.make(op, op.cases[case], torch.float32)
    if why := op.unavailable(version, **args):
        pytest.skip(why)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        op(**args, version=version)
    assert counter.get_total_flops() == pytest.approx(op.flops(op.cases[case], version), rel=0.01, abs=0)


def test_chunks_execute_more_than_the_mathematics_and_the_definition_reports_the_mathematics():
    op = next(op for op in OPS if op.name == "linear_recurrence")
    case = op.cases["packed"]
    assert op.flops(case) == op.flops(case, "reference") == 5 * 83 * 8 * 8 * 16
    assert op.flops(case, "chunked") > op.flops(case)
