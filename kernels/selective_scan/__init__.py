"""h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t, y_t = C_t h_t + D x_t: a diagonal state space per channel."""

from hybridlab.kernels.op import Op, Version, lazy
from hybridlab.kernels.selective_scan import chunked, step
from hybridlab.kernels.selective_scan.cases import CASES, check, flops, make, refuses_triton
from hybridlab.kernels.selective_scan.chunked import selective_scan_chunked
from hybridlab.kernels.selective_scan.reference import selective_scan_reference
from hybridlab.kernels.selective_scan.step import selective_scan_step

CPP = "hybridlab.kernels.selective_scan.cpp"
TRITON = lazy("hybridlab.kernels.selective_scan.triton_scan", "selective_scan_triton")
VERSIONS = {
    "triton": Version(
        TRITON, refuses_triton, device="cuda", untried=True, flops=lambda case: 0
    ),  # no matmuls, nor below
    "cpp": Version(lazy(CPP, "selective_scan_cpp"), lazy(CPP, "refuses"), device="cpu", flops=lambda case: 0),
    "step": Version(selective_scan_step, step.refuses, flops=step.flops),
    "chunked": Version(selective_scan_chunked, flops=chunked.flops),
}
selective_scan = Op("selective_scan", selective_scan_reference, VERSIONS, CASES, make, flops, check)
