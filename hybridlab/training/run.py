"""A run from its parts to its report."""

import functools
import json
import logging
import math
import os
import secrets
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch.utils.checkpoint import checkpoint as recompute

from hybridlab import checkpoint
from hybridlab.config import fingerprint
from hybridlab.tokenizer import DataError
from hybridlab.training import device as machine
from hybridlab.training.session import Lock, Refused, Stop, read, start, write


def fit(config: dict[str, Any], parts: SimpleNamespace) -> int:
    """Train to the end, a limit or a signal; -> exit code: 2 refused, 1 failed, 128 + n on signal n."""
    run = SimpleNamespace(config=config, parts=parts, stop=Stop(parts.trainer.max_minutes), began=time.monotonic())
    run.first = os.environ.get("LOCAL_RANK", "0") == "0"
    run.stop.install()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            run.folder = Path(scratch if config["dry_run"] else config["run_dir"])  # a dry run leaves no trace
            with Lock(run.folder) if run.first else nullcontext():
                return _train(run) if _prepare(run) else 0
    except (Refused, DataError, checkpoint.CheckpointError) as error:
        # that of a worker process comes with a traceback before it
        print(str(error).rpartition("DataError: ")[2].strip(), file=sys.stderr)
        return 1 if isinstance(error, checkpoint.CheckpointError) else 2


def _prepare(run: SimpleNamespace) -> bool:
    """Data, length and starting point of the run, written to run.json; False when it is complete already."""
    config, data, optim, settings, folder = run.config, run.parts.data, run.parts.optim, run.parts.trainer, run.folder
    run.kind = "cuda" if settings.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    if settings.accelerator == "gpu" and settings.devices > torch.cuda.device_count():
        raise Refused(f"trainer.devices={settings.devices} GPUs, but torch sees {torch.cuda.device_count()}")
    if data.batch_size % settings.devices:
        raise Refused(f"trainer.devices={settings.devices} does not divide data.batch_size={data.batch_size}")
    run.origin = start(config, folder)
    run.corpus = data.prepare(Path(config["cache"]))
    lengths = (optim.tokens, settings.max_tokens or optim.tokens)
    run.total, limit = (math.ceil(tokens / (data.batch_size * data.seq_len)) for tokens in lengths)
    run.end = 1 if config["dry_run"] else min(run.total, limit)
    info = read(folder / "run.json") or (read(run.origin.parent.parent / "run.json") if run.origin else {})
    if run.origin and int(run.origin.name[5:13]) >= run.end and info.get("status") == "complete":
        print(f"This run is complete ({run.end} steps); its report: {folder / 'report.md'}")
        return False
    before, now = info.get("corpus"), run.corpus.fingerprint
    if before not in (None, now):
        raise Refused(f"the data changed: this run began on {before}, but data={type(data).__name__} now gives {now}")
    devices = info.get("devices", settings.devices)
    if devices != settings.devices and run.first:
        print(f"{devices} processes before, {settings.devices} now: the same batches, sums equal up to rounding")
    numerics = info.get("numerics") if settings.precision == "auto" else None
    run.info = {"wandb_id": secrets.token_hex(4), **info} | {
        "fingerprint": fingerprint(config), "corpus": now, "status": "running", "devices": settings.devices,
        "numerics": numerics or machine.choose_numerics(run.kind, settings.precision), "config": config,
        "environment": machine.environment(run.kind),
    }  # fmt: skip
    if run.first:
        write(folder / "run.json", json.dumps(run.info, indent=1))
        write(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        if run.corpus.tokenizer is not None:
            run.corpus.tokenizer.save(folder / "tokenizer.json")
    return True


def _train(run: SimpleNamespace) -> int:
    # lightning takes seconds to import; by now signals are handled, and whatever refuses the run has been asked
    import lightning

    from hybridlab.training.callbacks.recording import Recorder
    from hybridlab.training.data import StepLoader
    from hybridlab.training.loggers import make_loggers
    from hybridlab.training.module import TrainingModule
    from hybridlab.training.parallel import Replicas
    from hybridlab.training.report import facts, finish, table

    # Lightning's advertisement, and its warnings about what is done here on purpose
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    config, parts, settings, precision = run.config, run.parts, run.parts.trainer, run.info["numerics"]["precision"]
    torch.set_float32_matmul_precision(run.info["numerics"]["matmul"])
    if run.kind == "cpu":
        machine.keep_memory()
    lightning.seed_everything(config["seed"], verbose=False)
    model = _build(run)
    if run.first:
        print(table(model, parts.data.seq_len) + "\n" + facts(run))
    module = TrainingModule(
        model, parts.optim, parts.objective, settings, total_steps=run.total, bf16=precision == "bf16"
    )
    rows = StepLoader(
        run.corpus, seed=config["seed"], batch_size=parts.data.batch_size, steps=run.end, workers=settings.workers
    )
    lightning.Trainer(
        accelerator="gpu" if run.kind == "cuda" else "cpu", devices=settings.devices, max_epochs=1,
        strategy=Replicas() if settings.devices > 1 else "auto", default_root_dir=run.folder, num_sanity_val_steps=0,
        callbacks=[Recorder(run, machine.peak_flops(run.kind, precision))], enable_checkpointing=False,
        logger=make_loggers(parts.logger, run), enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, rows)  # fmt: skip
    if run.first and module.failure:
        print(module.failure, file=sys.stderr)
    elif run.first and config["dry_run"]:
        print(f"dry run: one step taken, loss {module.record['loss']:.4f}; nothing is kept")
    elif run.first and module.step >= run.end and "valid_loss" in module.record:  # else stopped in the last validation
        finish(run, module)
    elif run.first:
        print(f"stopped after step {module.step} of {run.end}; the same command continues")
    return 1 if module.failure else 128 + run.stop.signal if run.first and run.stop.signal else 0


def _build(run: SimpleNamespace) -> torch.nn.Module:
    """The model, alive, with what is put on it from outside."""
    with torch.device("meta"):
        model = run.parts.model_factory()
    model.to_empty(device="cpu")
    model.reset_parameters()
    if run.config["init_from"] and run.origin is None:
        left = checkpoint.load_weights(model, Path(run.config["init_from"]), run.config["init_allow"])
        print("init_from: " + (", ".join(f"{name} {how}" for name, how in left.items()) or "all tensors taken"))
    for layer in model.layers.values() if run.parts.trainer.checkpoint_gradients else ():
        # activations are computed again in the backward pass; statistics are returned, so they count once
        layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False)
    if run.parts.trainer.compile:
        model.compile()
    return model
