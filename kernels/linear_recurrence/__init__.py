"""S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t."""

from hybridlab.kernels.linear_recurrence.cases import CASES, check, flops, make
from hybridlab.kernels.linear_recurrence.chunked import linear_recurrence_chunked
from hybridlab.kernels.linear_recurrence.reference import linear_recurrence_reference
from hybridlab.kernels.op import Op, Version

VERSIONS = {"chunked": Version(linear_recurrence_chunked)}
linear_recurrence = Op("linear_recurrence", linear_recurrence_reference, VERSIONS, CASES, make, flops, check)
