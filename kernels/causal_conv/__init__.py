"""The short depthwise causal convolution in front of most recurrences."""

from hybridlab.kernels.causal_conv import step
from hybridlab.kernels.causal_conv.cases import CASES, check, flops, make, no_matmul
from hybridlab.kernels.causal_conv.chunked import causal_conv_chunked
from hybridlab.kernels.causal_conv.reference import causal_conv_reference
from hybridlab.kernels.causal_conv.step import causal_conv_step
from hybridlab.kernels.op import Op, Version, lazy

TRITON = "hybridlab.kernels.causal_conv.triton_conv"
VERSIONS = {
    "triton": Version(lazy(TRITON, "causal_conv_triton"), refuses=lazy(TRITON, "refuses"), device="cuda", untried=True),
    "step": Version(causal_conv_step, step.refuses, flops=no_matmul),
    "chunked": Version(causal_conv_chunked, flops=no_matmul),
}
causal_conv = Op("causal_conv", causal_conv_reference, VERSIONS, CASES, make, flops, check)
