"""The one LightningModule: what happens in one optimizer step."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from hybridlab.data.batch import UNSCORED, Batch
from hybridlab.training.data import part
from hybridlab.training.guard import PATIENCE, Guard, first_bad
from hybridlab.training.parallel import rank_and_world, reduce, sum_gradients
from hybridlab.training.settings import TrainerSettings


class TrainingModule(LightningModule):
    """Accumulates the gradient of one global batch over micro-batches and ranks, checks it, then moves.

    total_steps   length of the schedule; a limit may end the run earlier, and does not bend it
    bf16          autocast; parameters, gradients and optimizer state stay float32
    step          optimizer steps done, skipped ones included: what the schedule and the data order count by
    stop          asked once per step: nonzero ends the run after this step, on all ranks
    failure       why the run cannot go on, or empty
    """

    def __init__(self, model: nn.Module, optim, objective, settings: TrainerSettings, *, total_steps: int, bf16: bool):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.optim, self.objective, self.settings = model, optim, objective, settings
        self.total_steps, self.bf16 = total_steps, bf16
        self.guard = Guard(settings.spike_sigmas)
        self.step, self.micro, self.stopping, self.failure = 0, settings.micro_batch_size, False, ""
        self.stop = lambda: False
        self.events: list[str] = []
        self.record: dict[str, float] = {}
        self.stats: dict[str, Tensor] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.optim.build(self.model)
        optimizer.work_dtype = torch.bfloat16 if self.bf16 else torch.float32
        return optimizer

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch  # each micro-batch moves when its turn comes

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        scored = reduce((batch.targets != UNSCORED).sum().to(self.device))
        parts = self._accumulate_within_memory(batch, scored)
        params = [p for p in self.model.parameters() if p.requires_grad]
        sum_gradients(params)
        sums = reduce(torch.stack([*parts.values(), torch.tensor(float(self.stop()), device=self.device)]))
        norms = [get_total_norm([p.grad for p in params if p.grad is not None]), get_total_norm(params)]
        # the one time in a step that the host waits for the device
        *values, stop, norm, size = torch.stack([*sums, *norms]).tolist()
        verdict = self.guard.judge(sum(values), norm, size)
        lr = self.optim.schedule.factor(self.step, self.total_steps)
        clipped = min(norm, self.settings.clip_norm or norm) if verdict == "ok" else 0.0
        self.step += 1
        if verdict == "ok":
            self._move(params, lr, clipped / norm if clipped < norm else 1.0)
        else:
            said = f"loss {sum(values):.4g}, gradient norm {norm:.4g}"
            self.events.append(f"step {self.step}: skipped, {verdict}: {said}")
        if self.guard.bad >= PATIENCE:
            self.failure = self._where(batch)
        self.stopping = stop > 0 or bool(self.failure)
        self.record = dict(zip(parts, values, strict=True)) | {
            "lr": lr * max(g["base_lr"] for g in self.optimizer.param_groups), "grad_norm": norm,
            "grad_norm_clipped": clipped, "param_norm": size, "skipped": self.guard.skipped,
        }  # fmt: skip
        self.zero_grad(set_to_none=True)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers(use_pl_optimizer=False)  # type: ignore[return-value]

    def _accumulate_within_memory(self, batch: Batch, scored: Tensor) -> dict[str, Tensor]:
        """Redo the step with smaller micro-batches when memory runs out: the same loss and gradient."""
        while True:
            try:
                return self._accumulate(batch, scored)
            except RuntimeError as error:  # OutOfMemoryError is one; a CPU's allocator has no class of its own
                rows = min(self.micro or len(batch.tokens), len(batch.tokens))
                full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
                if not full or rows == 1:
                    raise
            self.micro = rows // 2
            self.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self.events.append(f"step {self.step + 1}: out of memory, micro_batch_size {rows} -> {self.micro}")

    def _accumulate(self, batch: Batch, scored: Tensor) -> dict[str, Tensor]:
        """Gradients of this rank's rows; -> the loss in its parts, which add up over micro-batches and ranks."""
        n, self.stats = len(batch.tokens), {}
        parts: dict[str, Tensor] = {}
        for first, last in itertools.pairwise([*range(0, n, self.micro or n), n]):
            micro = part(batch, first, last, self.device)
            with self.autocast():
                share = (last - first) / (n * rank_and_world()[1])
                loss, found, stats = self.objective(self.model, micro, scored, share)
            loss.backward()
            parts = {name: parts.get(name, 0) + value for name, value in found.items()}
            self.stats = {name: self.stats.get(name, 0) + value for name, value in stats.items()}
        return parts

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _move(self, params: Sequence[Tensor], lr: float, scale: float) -> None:
        if scale < 1:
            torch._foreach_mul_([p.grad for p in params if p.grad is not None], scale)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["base_lr"]
        self.optimizer.step()

    def _where(self, batch: Batch) -> str:
        micro = part(batch, 0, min(len(batch.tokens), self.micro or len(batch.tokens)), self.device)
        with self.autocast():
            where = first_bad(self.model, micro.tokens, micro.packing)
        return (
            f"{PATIENCE} steps in a row, up to step {self.step}, were not finite and not taken; first found in {where}."
            " Weights and optimizer stand as before them."
        )

    def state(self) -> dict[str, Any]:
        """What continues a run, beside the weights."""
        guard, optimizer = self.guard.state_dict(), self.optimizer.state_dict()
        return {"step": self.step, "micro": self.micro, "guard": guard, "optimizer": optimizer}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step, self.micro = state["step"], state["micro"]
        self.guard.load_state_dict(state["guard"])
        self.optimizer.load_state_dict(state["optimizer"])
