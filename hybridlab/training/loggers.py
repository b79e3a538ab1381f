"""Lightning's loggers. Without an account or a network, Weights & Biases writes to the run's folder by itself."""

import os
from types import SimpleNamespace
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from hybridlab.training.settings import LoggerSettings


def make_loggers(settings: LoggerSettings, run: SimpleNamespace) -> list[Logger]:
    """The loggers beside metrics.jsonl, told the config and the environment."""
    if settings.kind == "none" or not run.first or run.config["dry_run"]:
        return []
    logger: Logger
    if settings.kind == "wandb":
        logger = _wandb(settings.project, run)
    else:
        kind = CSVLogger if settings.kind == "csv" else TensorBoardLogger
        logger = kind(run.folder, name=settings.kind, version="")
    logger.log_hyperparams({**run.config, "environment": run.info["environment"]})
    return [logger]


def _wandb(project: str, run: SimpleNamespace) -> Logger:
    import wandb

    os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
    named = {"project": project, "name": run.config["name"], "id": run.info["wandb_id"], "dir": run.folder}
    try:
        logger = WandbLogger(experiment=wandb.init(**named, mode=mode, resume="allow" if mode == "online" else None))
    except Exception as error:  # whatever the network or the service brings up, the run goes on
        print(f"Weights & Biases {mode} failed: {str(error).splitlines()[0]}")
        mode, logger = "offline", WandbLogger(experiment=wandb.init(**named, mode="offline"))
    later = f"; later: wandb sync {run.folder / 'wandb' / 'offline-run-*'}" if mode == "offline" else ""
    print(f"Weights & Biases: {mode}{later}")
    return logger
