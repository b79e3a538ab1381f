"""Batches for the trainer: the step's number says which rows, so one integer is all there is to resume."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from hybridlab.data.batch import Batch
from hybridlab.data.order import order
from hybridlab.packing import Packing
from hybridlab.training.parallel import rank_and_world

AHEAD = 2  # steps whose rows are read while earlier ones train


class StepLoader(LightningDataModule):
    """This rank's rows of every optimizer step, from `position` to `steps`; rank r holds the r-th part of each batch.

    workers   processes that read rows; with 0, a thread does. The order is the same either way.
    """

    def __init__(self, corpus, *, seed: int, batch_size: int, steps: int, workers: int = 0):
        super().__init__()
        self.corpus, self.seed, self.batch_size, self.steps, self.workers = corpus, seed, batch_size, steps, workers
        self.position = 0

    def train_dataloader(self) -> "StepLoader":
        return self

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rank, world = rank_and_world()
        share = self.batch_size // world
        first = step * self.batch_size + rank * share
        rows = order(self.seed, self.corpus.n_rows("train"), torch.arange(first, first + share))
        return self.corpus.rows("train", rows)

    def __iter__(self) -> Iterator[Batch]:
        todo = range(self.position, self.steps)
        for batch in self._in_processes(todo) if self.workers else self._in_thread(todo):
            self.position += 1
            yield batch

    def _in_processes(self, todo: range) -> Iterator[Batch]:
        return iter(
            DataLoader(
                self,
                None,
                sampler=todo,
                num_workers=self.workers,
                collate_fn=lambda batch: batch,
                generator=torch.Generator(),
            )
        )

    def _in_thread(self, todo: range) -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as pool:
            reading: deque = deque()
            for step in todo:
                reading.append(pool.submit(self.__getitem__, step))
                if len(reading) > AHEAD:
                    yield reading.popleft().result()
            while reading:
                yield reading.popleft().result()

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def part(batch: Batch, first: int, last: int, device: torch.device | str) -> Batch:
    """Rows `first` to `last` of a batch, on `device`."""
    time = batch.tokens.shape[1]
    offsets = batch.packing.offsets
    inside = offsets[(offsets >= first * time) & (offsets <= last * time)] - first * time
    packing = Packing(inside, int(inside.diff().max()))
    tokens, targets, rows = (
        t[first:last].to(device, non_blocking=True) for t in (batch.tokens, batch.targets, batch.rows)
    )
    return Batch(tokens, targets, packing.to(device), rows)
