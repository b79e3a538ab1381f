"""A model, a corpus and a run small enough for hundreds of steps a second."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hybridlab.data.batch import Batch, Corpus
from hybridlab.models.block import Block
from hybridlab.models.ffn.gated import SwiGLU
from hybridlab.models.ffn.moe import MoE
from hybridlab.models.lm import HybridLM
from hybridlab.models.mixer import TokenMixer
from hybridlab.packing import Packing
from hybridlab.training.objectives.next_token import NextToken
from hybridlab.training.optimizers import Muon
from hybridlab.training.settings import LoggerSettings, TrainerSettings

VOCAB, TIME, ROWS = 33, 16, 50


class WindowMean(TokenMixer):
    """The mean of the last four inputs of the same document, between two projections."""

    def __init__(self, d_model: int):
        super().__init__()
        self.d_model = d_model
        self.inner, self.out = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.gate = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.gate)

    def forward(self, x, packing=None):
        t = torch.arange(x.shape[1])
        near = (t[:, None] >= t) & (t[:, None] - t < 4)
        if packing is not None:
            ids = packing.row_ids(x.shape[1])
            near = near & (ids[:, :, None] == ids[:, None])
        weight = near.to(x.dtype) / near.sum(-1, keepdim=True)
        return self.out((weight @ self.inner(x)) * self.gate.sigmoid())

    def init_state(self, batch, max_len, device=None, dtype=None):
        return torch.zeros(batch, 4, self.d_model, device=device)

    def step(self, x, state):
        raise NotImplementedError

    def flops(self, length):
        return 4 * self.d_model**2 * length


class Counting(Corpus):
    """Rows that count upwards by ones and twos, with unequal numbers of scored tokens."""

    vocab_size, fingerprint, facts, token_bytes = VOCAB, "counting", {"kind": "counting"}, torch.ones(VOCAB).long()

    def __init__(self):
        steps = torch.randint(1, 3, (ROWS, TIME + 1), generator=torch.Generator().manual_seed(1))
        self.all = steps.cumsum(1) % VOCAB

    def n_rows(self, split):
        return ROWS if split == "train" else 7

    def rows(self, split, indices):
        index = torch.as_tensor(indices)
        row, starts = self.all[index], torch.zeros(len(index), TIME, dtype=torch.bool)
        starts[:, ::7] = True
        targets = row[:, 1:].clone()
        targets[index % 3 == 0, :9] = -100
        return Batch(row[:, :-1].clone(), targets, Packing.from_starts(starts), index)


def build(moe: bool = False) -> HybridLM:
    ffn = partial(MoE, n_experts=4, top_k=2, d_hidden=16) if moe else partial(SwiGLU, d_hidden=32)
    blocks = {"mean": partial(Block, mixer=WindowMean, ffn=ffn)}
    return HybridLM(vocab_size=VOCAB, d_model=16, pattern=["mean"], n_layers=2, blocks=blocks)


@pytest.fixture
def tiny(tmp_path):
    """tiny.model(moe), tiny.corpus, and tiny.run(config keys, **trainer settings) -> arguments of `fit`."""

    def run(moe=False, optim=None, batch_size=4, logger="none", keys=(), **settings):
        config = {
            "model": {"moe": moe}, "data": {}, "optim": {}, "objective": {}, "trainer": settings, "logger": {},
            "seed": 0, "name": "tiny", "run_dir": str(tmp_path / "run"), "resume": "auto", "init_from": None,
            "init_allow": [], "cache": str(tmp_path), "dry_run": False,
        } | dict(keys)  # fmt: skip
        data = SimpleNamespace(batch_size=batch_size, seq_len=TIME, prepare=lambda folder: Counting())
        settings = {"precision": "fp32", "accelerator": "cpu", "valid_every": 5, "save_every": 5} | settings
        return config, SimpleNamespace(
            model_factory=partial(build, moe), data=data, optim=optim or Muon(tokens=20 * 4 * TIME),
            objective=NextToken(z_loss=1e-4), trainer=TrainerSettings(**settings), logger=LoggerSettings(kind=logger),
        )  # fmt: skip

    torch.manual_seed(0)
    return SimpleNamespace(model=build, corpus=Counting(), run=run, path=tmp_path)
