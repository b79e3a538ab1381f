"""y_i = x_i W_e for the rows i of expert e: one matrix product per expert, no row dropped."""

from hybridlab.kernels.grouped_matmul.cases import CASES, check, flops, make
from hybridlab.kernels.grouped_matmul.plain import grouped_matmul_by_expert, grouped_matmul_torch, refuses
from hybridlab.kernels.grouped_matmul.reference import grouped_matmul_reference
from hybridlab.kernels.op import Op, Version

VERSIONS = {
    "torch": Version(grouped_matmul_torch, refuses),
    "by_expert": Version(grouped_matmul_by_expert, flops=flops),
}
grouped_matmul = Op("grouped_matmul", grouped_matmul_reference, VERSIONS, CASES, make, flops, check)
