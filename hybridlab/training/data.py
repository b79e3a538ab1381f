"""Batches for the trainer: the step's number says which rows, so there is nothing else to resume."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from hybridlab.data.batch import Batch
from hybridlab.data.order import order
from hybridlab.packing import Packing
from hybridlab.training.parallel import rank_and_world


class StepLoader(LightningDataModule):
    """This rank's rows of every step, from the module's to `steps`; rank r holds the r-th part of each batch.

    workers   processes that read rows ahead; with 0 they are read in turn. The order is the same either way.
    """

    def __init__(self, corpus, *, seed: int, batch_size: int, steps: int, workers: int = 0):
        super().__init__()
        self.corpus, self.seed, self.batch_size, self.steps, self.workers = corpus, seed, batch_size, steps, workers

    def train_dataloader(self) -> "StepLoader":
        return self

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rank, world = rank_and_world()
        share = self.batch_size // world
        first = step * self.batch_size + rank * share
        rows = order(self.seed, self.corpus.n_rows("train"), torch.arange(first, first + share))
        return self.corpus.rows("train", rows.tolist())

    def __iter__(self) -> Iterator[Batch]:
        done: Any = self.trainer.lightning_module.step  # type: ignore[union-attr]
        todo, alone, rows = range(done, self.steps), torch.Generator(), cast(Dataset, self)
        return iter(DataLoader(rows, None, sampler=todo, num_workers=self.workers, generator=alone))


def part(batch: Batch, first: int, last: int, device: torch.device | str) -> Batch:
    """Rows `first` to `last` of a batch, on `device`."""
    time, offsets = batch.tokens.shape[1], batch.packing.offsets
    inside = offsets[(offsets >= first * time) & (offsets <= last * time)] - first * time
    packing = Packing(inside, int(inside.diff().max())).to(device)
    whole = (batch.tokens, batch.targets, batch.rows)
    tokens, targets, rows = (t[first:last].to(device, non_blocking=True) for t in whole)
    return Batch(tokens, targets, packing, rows)
