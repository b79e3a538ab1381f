"""S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t."""

from hybridlab.kernels.linear_recurrence import chunked, step
from hybridlab.kernels.linear_recurrence.cases import CASES, check, flops, make
from hybridlab.kernels.linear_recurrence.chunked import linear_recurrence_chunked
from hybridlab.kernels.linear_recurrence.reference import linear_recurrence_reference
from hybridlab.kernels.linear_recurrence.step import linear_recurrence_step
from hybridlab.kernels.op import Op, Version, lazy

_TRITON = "hybridlab.kernels.linear_recurrence.triton_op"
_CPP = "hybridlab.kernels.linear_recurrence.cpp"
VERSIONS = {
    "step": Version(linear_recurrence_step, step.refuses, flops=step.flops),
    "triton": Version(
        lazy(_TRITON, "linear_recurrence_triton"),
        lazy(_TRITON, "refuses"),
        device="cuda",
        untried=True,
        flops=lazy(_TRITON, "flops"),
    ),
    "cpp": Version(lazy(_CPP, "linear_recurrence_cpp"), lazy(_CPP, "refuses"), device="cpu", flops=lazy(_CPP, "flops")),
    "chunked": Version(linear_recurrence_chunked, flops=chunked.flops),
}
linear_recurrence = Op("linear_recurrence", linear_recurrence_reference, VERSIONS, CASES, make, flops, check)
