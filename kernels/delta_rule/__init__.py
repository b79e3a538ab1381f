"""S_t = (I − β_t k_t k_tᵀ) diag(exp(log_decay_t)) S_{t-1} + β_t k_t v_tᵀ, y_t = S_tᵀ q_t."""

from hybridlab.kernels.delta_rule.cases import CASES, check, flops, make
from hybridlab.kernels.delta_rule.chunked import delta_rule_chunked
from hybridlab.kernels.delta_rule.reference import delta_rule_reference
from hybridlab.kernels.op import Op, Version

delta_rule = Op("delta_rule", delta_rule_reference, {"chunked": Version(delta_rule_chunked)}, CASES, make, flops, check)
