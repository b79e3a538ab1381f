"""h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t, y_t = C_t h_t + D x_t: a diagonal state space per channel."""

from hybridlab.kernels.op import Op, Version
from hybridlab.kernels.selective_scan.cases import CASES, check, flops, make
from hybridlab.kernels.selective_scan.chunked import selective_scan_chunked
from hybridlab.kernels.selective_scan.reference import selective_scan_reference

VERSIONS = {"chunked": Version(selective_scan_chunked)}
selective_scan = Op("selective_scan", selective_scan_reference, VERSIONS, CASES, make, flops, check)
