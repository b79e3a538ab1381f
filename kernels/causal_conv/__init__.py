"""The short depthwise causal convolution in front of most recurrences."""

from hybridlab.kernels.causal_conv.cases import CASES, check, flops, make
from hybridlab.kernels.causal_conv.chunked import causal_conv_chunked
from hybridlab.kernels.causal_conv.reference import causal_conv_reference
from hybridlab.kernels.op import Op, Version

VERSIONS = {"chunked": Version(causal_conv_chunked)}
causal_conv = Op("causal_conv", causal_conv_reference, VERSIONS, CASES, make, flops, check)
