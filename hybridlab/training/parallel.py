"""Several processes: one share of each global batch per rank, sums across ranks, the same result as one process."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor


class Replicas(DDPStrategy):
    """Lightning's DDP processes without its wrapper: gradients are summed once per step, by `sum_gradients`.

    So a rank may redo its micro-batches (out of memory) or meet none of an expert's tokens without desynchronising
    the others, at the price of no overlap between the backward pass and communication.
    """

    def configure_ddp(self) -> None:
        """Leave the module unwrapped."""


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def reduce(t: Tensor) -> Tensor:
    """Sum over ranks, in place; a no-op in a single process."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(t)
    return t


def gather(t: Tensor) -> Tensor:
    """Tensors of equal shape from all ranks, one after another in rank order."""
    rank, world = rank_and_world()
    found = t.new_zeros(world, *t.shape)
    found[rank] = t
    return reduce(found).flatten(0, 1)


def sum_gradients(params: Sequence[Tensor]) -> None:
    """Replace every gradient by its sum over ranks; a parameter that some rank did not use counts 0 there."""
    for p in params if rank_and_world()[1] > 1 else ():
        p.grad = reduce(torch.zeros_like(p) if p.grad is None else p.grad)
