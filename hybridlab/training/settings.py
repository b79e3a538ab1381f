"""What `trainer=` and `logger=` in a config may say, and the rules that settings keep. Imports nothing heavy."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Refuses numbers out of range and unknown choices when it is made."""

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value, choices = field.name, getattr(self, field.name), get_args(field.type)
            if get_origin(field.type) is Literal and value not in choices:
                raise ValueError(f"{name}={value!r} is not one of {choices}")
            if isinstance(value, int | float) and not isinstance(value, bool):
                holds, rule = _rule(name, value)
                if not holds:
                    raise ValueError(f"{name}={value}: give a number {rule}")


def _rule(name: str, value: float) -> tuple[bool, str]:
    if name.endswith("_ratio") or name == "final":
        return 0 <= value <= 1, "from 0 to 1"
    if name in ("momentum", "beta1", "beta2"):
        return 0 <= value < 1, "from 0 to below 1"
    if name in ("weight_decay", "z_loss", "workers"):
        return value >= 0, "of 0 or more"
    return value > 0, "above 0"


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(Settings):
    """How a run is driven; of these, only `clip_norm`, `spike_sigmas` and `precision` change what is learned.

    max_tokens        stop after so many; None: at the end of the schedule, `optim.tokens`
    max_minutes       end this session cleanly; the schedule is not bent, and the same command continues
    micro_batch_size  rows per forward pass and process; None: all of the step's
    spike_sigmas      skip a step whose loss or gradient norm lies so many deviations above recent ones; None: never
    valid_every       steps between validations on the first `valid_rows` rows (None: all); at the end, on all
    keep              how many of the last checkpoints stay, beside the best by validation
    workers           processes that read data ahead; 0: it is read between steps
    """

    max_tokens: int | None = None
    max_minutes: float | None = None
    micro_batch_size: int | None = None
    clip_norm: float | None = 1.0
    spike_sigmas: float | None = 6.0
    valid_every: int | None = 250
    valid_rows: int | None = None
    save_every: int = 250
    keep: int = 2
    compile: bool = False
    checkpoint_gradients: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    workers: int = 0
    sample_prompts: Sequence[str] = ("def ", "import ", "class ")
    sample_tokens: int = 64


@dataclass(frozen=True, kw_only=True)
class LoggerSettings(Settings):
    """Where metrics go beside `metrics.jsonl`, which is always written."""

    kind: Literal["wandb", "tensorboard", "csv", "none"] = "wandb"
    project: str = "hybridlab"
