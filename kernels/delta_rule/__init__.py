"""S_t = (I − β_t k_t k_tᵀ) diag(exp(log_decay_t)) S_{t-1} + β_t k_t v_tᵀ, y_t = S_tᵀ q_t."""

from hybridlab.kernels.delta_rule import chunked, step
from hybridlab.kernels.delta_rule.cases import CASES, check, flops, make
from hybridlab.kernels.delta_rule.chunked import delta_rule_chunked
from hybridlab.kernels.delta_rule.reference import delta_rule_reference
from hybridlab.kernels.delta_rule.step import delta_rule_step
from hybridlab.kernels.op import Op, Version, lazy

_TRITON = "hybridlab.kernels.delta_rule.triton_delta_rule"
VERSIONS = {
    "step": Version(delta_rule_step, step.refuses, flops=step.flops),
    "triton": Version(
        lazy(_TRITON, "delta_rule_triton"),
        lazy(_TRITON, "refuses"),
        device="cuda",
        untried=True,
        flops=lazy(_TRITON, "flops"),
    ),
    "chunked": Version(delta_rule_chunked, flops=chunked.flops),
}
delta_rule = Op("delta_rule", delta_rule_reference, VERSIONS, CASES, make, flops, check)
