"""Every op, by name. Tests and benchmarks run over this list."""

from hybridlab.kernels.causal_conv import causal_conv
from hybridlab.kernels.delta_rule import delta_rule
from hybridlab.kernels.grouped_matmul import grouped_matmul
from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.kernels.selective_scan import selective_scan

OPS = [causal_conv, linear_recurrence, delta_rule, selective_scan, grouped_matmul]
