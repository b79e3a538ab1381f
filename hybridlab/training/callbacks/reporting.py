"""What a run says while it trains: metrics.jsonl, loggers, the progress bar, validation, samples."""

import json
import math
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor
from tqdm import tqdm

from hybridlab.evaluation.score import figures, score
from hybridlab.training.module import TrainingModule
from hybridlab.training.parallel import gather, rank_and_world, reduce
from hybridlab.training.session import Stop, write


class Reporter(Callback):
    """One line per step in metrics.jsonl, each step once and in order however often the run is killed and resumed.

    Everything measured with a clock is keyed `time/…`; all other keys are equal in equal runs. A validation stands in
    the line of its step.
    """

    def __init__(self, run: SimpleNamespace, peak: float | None):
        self.path, self.corpus, self.settings, self.stop = (
            run.folder / "metrics.jsonl",
            run.corpus,
            run.parts.trainer,
            run.stop,
        )
        self.end, self.peak, self.validated, self.clock = run.end, peak, 0, 0.0
        self.dry = run.config["dry_run"]
        self.lines: Any = None
        self.bar: Any = None

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        kept = cut_back(self.path, module.step) if trainer.is_global_zero else []
        made_up = False
        if module.step and self._due(module.step) and self.validated < module.step:
            # the run was stopped while it validated: do it now, as if it had not been
            module.record = kept[-1] if kept and kept[-1]["step"] == module.step else {"step": module.step}
            made_up = self._validate(module)
        if trainer.is_global_zero:
            cut_back(self.path, module.step - made_up)
            self.lines = self.path.open("a")
        if made_up:
            self._write(trainer, module)
        self.bar = tqdm(
            total=self.end, initial=module.step, unit="step", dynamic_ncols=True, disable=not trainer.is_global_zero,
            mininterval=0.5 if sys.stderr.isatty() else 20, smoothing=0.1,
        )  # fmt: skip
        self.clock = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: TrainingModule, _: Any, batch: Any, index: int) -> None:
        seconds, step = time.perf_counter() - self.clock, module.step
        tokens = batch.tokens.numel() * rank_and_world()[1]
        rows = gather(batch.rows.to(module.device))
        module.record = {"step": step, "tokens": step * tokens, **module.record} | {
            "time/seconds": seconds, "time/tokens_per_second": tokens / seconds,
        }  # fmt: skip
        flops = 3 * module.model.flops(batch.tokens.shape[1]) * len(rows) / seconds
        module.record |= {"time/flops_per_second": flops} | (
            {"time/share_of_peak": flops / self.peak} if self.peak else {}
        )
        if step % self.settings.log_every == 0 or self._due(step) or module.stopping:
            module.record |= {"rows": zlib.crc32(rows.cpu().numpy().tobytes())} | router_health(module.stats)
            if self._due(step):
                self._validate(module)
            self._write(trainer, module)
        for event in module.events:
            self.bar.write(event, file=sys.stderr)
        module.events.clear()
        self.bar.set_postfix_str(f"loss {module.record['loss']:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
        self.bar.update()
        self.clock = time.perf_counter()

    def teardown(self, trainer: Trainer, module: TrainingModule, stage: str) -> None:
        for stream in (self.lines, self.bar):
            if stream is not None:
                stream.close()

    def _due(self, step: int) -> bool:
        every = self.settings.valid_every
        return not self.dry and (step == self.end or (every is not None and step % every == 0))

    def _validate(self, module: TrainingModule) -> bool:
        """Add validation to the record; False when the run was asked to stop before it was done."""
        rows = None if module.step == self.end else self.settings.valid_rows
        began = time.perf_counter()
        found = validate(module, self.corpus, rows, self.stop)
        module.stopping = module.stopping or found is None
        if found is not None:
            self.validated = module.step
            module.record |= found | {"time/validation": time.perf_counter() - began}
        return found is not None

    def _write(self, trainer: Trainer, module: TrainingModule) -> None:
        if self.lines is not None:
            self.lines.write(json.dumps(module.record) + "\n")
            self.lines.flush()
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in module.record.items() if k != "step"}, module.step)

    def state_dict(self) -> dict[str, Any]:
        return {"validated": self.validated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.validated = state["validated"]


def cut_back(path: Path, step: int) -> list[dict]:
    """Keep the lines of metrics.jsonl up to `step`, dropping what a killed run wrote beyond its last checkpoint."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # torn by a kill; nothing follows it
            break
        if record["step"] <= step:
            kept.append(record)
    write(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


@torch.no_grad()
def validate(module: TrainingModule, corpus, rows: int | None, stop: Stop) -> dict[str, float] | None:
    """Figures over the first `rows` held-out rows, divided among ranks; None when asked to stop midway."""
    rank, world = rank_and_world()
    n = min(rows or corpus.n_rows("valid"), corpus.n_rows("valid"))
    chunk, sums = module.micro or 8, torch.zeros(4, dtype=torch.float64)
    module.eval()
    for first in range(0, n, chunk * world):
        if reduce(torch.tensor(float(stop.requested()), device=module.device)) > 0:
            break
        if mine := range(min(first + rank * chunk, n), min(first + (rank + 1) * chunk, n)):
            with module.autocast():
                sums += score(module.model, corpus.rows("valid", torch.tensor(mine)), corpus.token_bytes)
    else:
        found = figures(reduce(sums.to(module.device)).cpu())
        module.train()
        return {f"valid_{k}": found[k] for k in ("loss", "accuracy", "bits_per_byte") if k in found}
    module.train()
    return None


def router_health(stats: dict[str, Tensor]) -> dict[str, float]:
    """Per layer of experts: entropy of the load over its maximum, largest load over the mean, experts left idle."""
    found: dict[str, float] = {}
    for name, value in stats.items():
        if name.endswith(".load"):
            share = reduce(value.float().clone()) / value.sum().clamp(min=1)
            share, place = share / share.sum().clamp(min=1e-9), name.removesuffix(".load")
            found[f"router/{place}.entropy"] = float(torch.special.entr(share).sum() / math.log(max(len(share), 2)))
            found[f"router/{place}.max_load"] = float(share.max() * len(share))
            found[f"router/{place}.dead"] = int((share == 0).sum())
    return found
