"""When and what a run saves, and how it ends early without losing a step."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins import CheckpointIO

from hybridlab import checkpoint
from hybridlab.training.module import TrainingModule
from hybridlab.training.parallel import rank_and_world


class FolderIO(CheckpointIO):
    """Lightning's checkpoints as folders of `hybridlab.checkpoint`, without loop counters: our step says it all."""

    def __init__(self, run: SimpleNamespace):
        self.config, tokenizer = run.config, run.folder / "tokenizer.json"
        self.tokenizer = tokenizer if tokenizer.exists() else None

    def save_checkpoint(self, checkpoint_: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        state = {k.removeprefix("model."): v for k, v in checkpoint_.pop("state_dict").items()}
        del checkpoint_["loops"]
        checkpoint.save(path, state, self.config, tokenizer=self.tokenizer, trainer=checkpoint_)

    def load_checkpoint(self, path: Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        state = {f"model.{k}": v for k, v in checkpoint.load_state(path).items()}
        return {**checkpoint.load_trainer(path), "state_dict": state}

    def remove_checkpoint(self, path: Path) -> None:
        raise NotImplementedError(f"{path}: checkpoints are removed by hybridlab.checkpoint.prune")


class Saver(Callback):
    """Saves every `save_every` steps, at the end, and when the run is stopped; keeps the last `keep` and the best."""

    def __init__(self, run: SimpleNamespace):
        self.folder, self.stop = run.folder, run.stop
        self.every, self.keep = run.parts.trainer.save_every, run.parts.trainer.keep
        self.best: tuple[float, int] | None = None
        self.saved: int | None = None
        self.rng: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, module: TrainingModule) -> None:
        # from here on there is a state to save, and signals wait for it
        module.stop, self.stop.training = self.stop.requested, True

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        self.stop.install()  # over Lightning's own handlers
        self.saved, self.rng = module.step or None, rng_state()
        if trainer.world_size == 1 and self.stop.requested():
            self._save(trainer, module)
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, module: TrainingModule, *_: Any) -> None:
        self.rng = rng_state()
        score = module.record.get("valid_bits_per_byte", module.record.get("valid_loss"))
        if score is not None and (self.best is None or score < self.best[0]):
            self.best = (score, module.step)
        module.stopping |= trainer.world_size == 1 and self.stop.requested()  # several ranks agree within a step
        if module.step % self.every == 0 or module.stopping or score is not None:
            self._save(trainer, module)
        trainer.should_stop = trainer.should_stop or module.stopping

    def on_train_end(self, trainer: Trainer, module: TrainingModule) -> None:
        if self.saved != module.step:
            self._save(trainer, module)

    def on_exception(self, trainer: Trainer, module: TrainingModule, error: BaseException) -> None:
        whole = self.rng and not module.moving and rank_and_world()[1] == 1
        if whole and self.saved != module.step and not isinstance(error, checkpoint.CheckpointError):
            self._save(trainer, module)

    def _save(self, trainer: Trainer, module: TrainingModule) -> None:
        folders = self.folder / "checkpoints"
        trainer.save_checkpoint(folders / f"step-{module.step:08d}")
        self.saved = module.step
        if trainer.is_global_zero:
            checkpoint.prune(self.folder, self.keep, folders / f"step-{self.best[1]:08d}" if self.best else None)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
        set_rng_state(state["rng"])


def rng_state() -> dict[str, Any]:
    """Every generator's state in plain values and tensors."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy = [str(name), torch.from_numpy(keys.astype(np.int64)), *(type(x)(x) for x in rest)]
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(), "numpy": numpy}


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
