"""What is kept of a run while it trains: metrics, validations, checkpoints; and how it ends without losing a step."""

import json
import math
import random
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, Trainer
from torch import Tensor
from tqdm import tqdm

from hybridlab import checkpoint
from hybridlab.data.batch import Batch
from hybridlab.evaluation.score import figures, rows_at_once, score
from hybridlab.training.module import TrainingModule
from hybridlab.training.parallel import gather, rank_and_world, reduce
from hybridlab.training.session import Stop, write


class Recorder(Callback):
    """After each step: its line in metrics.jsonl with any validation in it, then a checkpoint where one is due.

    Each step has one line, in order, however often the run is killed and resumed. Everything measured with a clock is
    keyed `time/…`; all other keys are equal in equal runs. Checkpoints come every `save_every` steps, after a
    validation and when the run is stopped; the last `keep` and the best stay.
    """

    def __init__(self, run: SimpleNamespace, peak: float | None):
        self.run, self.settings, self.peak, self.path = run, run.parts.trainer, peak, run.folder / "metrics.jsonl"
        self.best: tuple[float, int] | None = None
        self.bar: Any = None
        self.clock = 0.0

    def on_fit_start(self, trainer: Trainer, module: TrainingModule) -> None:
        if self.run.origin:
            checkpoint.load_weights(module.model, self.run.origin)
            state = checkpoint.load_trainer(self.run.origin)
            module.load_state(state["module"])
            set_rng_state(state["rng"])
            self.best = state["best"]
        # from here on there is a state to save, and signals wait for it
        module.stop, self.run.stop.training = self.run.stop.requested, True

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        self.run.stop.install()  # over Lightning's own handlers
        self.bar = tqdm(
            total=self.run.end, initial=module.step, unit="step", dynamic_ncols=True, smoothing=0.1,
            mininterval=0.5 if sys.stderr.isatty() else 20, disable=not trainer.is_global_zero,
        )  # fmt: skip
        kept = cut_back(self.path, module.step, rewrite=trainer.is_global_zero)
        module.record = kept[-1] if kept else {"step": module.step}
        if module.step and self._due(module.step) and "valid_loss" not in module.record:
            # the run was stopped while it validated: do it now, as if it had not been
            cut_back(self.path, module.step - 1, rewrite=trainer.is_global_zero)
            self._close_step(trainer, module)
        self.clock = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: TrainingModule, _: Any, batch: Batch, index: int) -> None:
        seconds = time.perf_counter() - self.clock
        rows = gather(batch.rows.to(module.device))
        length = batch.tokens.shape[1]
        tokens, model = len(rows) * length, cast(Any, module.model)
        flops = 3 * model.flops(length) * len(rows) / seconds
        module.record = {
            "step": module.step, "tokens": module.step * tokens, **module.record,
            "rows": zlib.crc32(rows.cpu().numpy().tobytes()), **router_health(module.stats), "time/seconds": seconds,
            "time/tokens_per_second": tokens / seconds, "time/flops_per_second": flops,
        }  # fmt: skip
        if self.peak:
            module.record["time/share_of_peak"] = flops / self.peak
        self._close_step(trainer, module)
        for event in module.events:
            self.bar.write(event, file=sys.stderr)
        module.events.clear()
        self.bar.set_postfix_str(f"loss {module.record['loss']:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
        self.bar.update()
        self.clock = time.perf_counter()

    def on_exception(self, trainer: Trainer, module: TrainingModule, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")

    def teardown(self, trainer: Trainer, module: TrainingModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()

    def _due(self, step: int) -> bool:
        every = self.settings.valid_every
        return not self.run.config["dry_run"] and (step == self.run.end or (every is not None and step % every == 0))

    def _close_step(self, trainer: Trainer, module: TrainingModule) -> None:
        """Validate where it is due, write the step's line, save where it is due."""
        found: dict[str, float] = {}
        if self._due(module.step):
            began, rows = time.perf_counter(), None if module.step == self.run.end else self.settings.valid_rows
            found = validate(module, self.run.corpus, rows, self.run.stop)
            module.record |= found
            module.record["time/validation"] = time.perf_counter() - began
            module.stopping |= not found
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(module.record) + "\n")
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in module.record.items() if k != "step"}, module.step)
        figure = found.get("valid_bits_per_byte", found.get("valid_loss", math.inf))
        if figure < (self.best or [math.inf])[0]:
            self.best = (figure, module.step)
        if module.step % self.settings.save_every == 0 or module.stopping or found:
            self._save(trainer, module)
        trainer.should_stop = trainer.should_stop or module.stopping

    def _save(self, trainer: Trainer, module: TrainingModule) -> None:
        if trainer.is_global_zero:
            folders, tokenizer = self.run.folder / "checkpoints", self.run.folder / "tokenizer.json"
            best = folders / f"step-{self.best[1]:08d}" if self.best else None
            checkpoint.save(
                folders / f"step-{module.step:08d}", module.model.state_dict(), self.run.config,
                tokenizer=tokenizer if tokenizer.exists() else None,
                trainer={"module": module.state(), "rng": rng_state(), "best": self.best},
            )  # fmt: skip
            checkpoint.prune(self.run.folder, self.settings.keep, best)


def cut_back(path: Path, step: int, rewrite: bool) -> list[dict]:
    """The lines of metrics.jsonl up to `step`; `rewrite` drops what a killed run wrote beyond its last checkpoint."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # torn by a kill; nothing follows it
            break
        if record["step"] <= step:
            kept.append(record)
    if rewrite:
        write(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


@torch.no_grad()
def validate(module: TrainingModule, corpus, rows: int | None, stop: Stop) -> dict[str, float]:
    """Figures over the first `rows` held-out rows, divided among ranks; none when asked to stop midway."""
    rank, world = rank_and_world()
    todo = range(min(rows or corpus.n_rows("valid"), corpus.n_rows("valid")))
    found: dict[str, float] = {}
    chunk, sums = rows_at_once(corpus), torch.zeros(4, dtype=torch.float64)
    module.eval()
    for first in range(0, len(todo), chunk * world):
        if reduce(torch.tensor(float(stop.requested()), device=module.device)) > 0:
            break
        if mine := todo[first + rank * chunk :][:chunk]:
            with module.autocast():
                sums += score(module.model, corpus.rows("valid", mine), corpus.token_bytes)
    else:
        found = figures(reduce(sums.to(module.device)).cpu())
    module.train()
    return {f"valid_{k}": found[k] for k in ("loss", "accuracy", "bits_per_byte") if k in found}


def router_health(stats: dict[str, Tensor]) -> dict[str, float]:
    """Per layer of experts: entropy of the load over its maximum, largest load over the mean, experts left idle."""
    found: dict[str, float] = {}
    for name, value in stats.items():
        if name.endswith(".load"):
            load, place = reduce(value.float().clone()), f"router/{name.removesuffix('.load')}"
            share = load / load.sum().clamp(min=1e-9)
            found[f"{place}.entropy"] = float(torch.special.entr(share).sum() / math.log(max(len(share), 2)))
            found[f"{place}.max_load"] = float(share.max() * len(share))
            found[f"{place}.dead"] = int((share == 0).sum())
    return found


def rng_state() -> dict[str, Any]:
    """Every generator's state in plain values and tensors."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(), "numpy": numpy}


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
