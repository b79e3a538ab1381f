"""What `trainer=` and `logger=` in a config may say. Imports nothing heavy, so that configs are checked quickly."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How a run is driven; of these, only `clip_norm`, `spike_sigmas` and `precision` change what is learned.

    max_tokens        stop after so many; None: at the end of the schedule, `optim.tokens`
    max_minutes       end this session cleanly; the schedule is not bent, and the same command continues
    micro_batch_size  rows per forward pass and process; None: all of the step's
    spike_sigmas      skip a step whose loss or gradient norm lies so many deviations above recent ones; None: never
    valid_every       steps between validations on the first `valid_rows` rows (None: all); at the end, on all
    keep              how many of the last checkpoints stay, beside the best by validation
    workers           processes that read data; 0: a thread
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
    log_every: int = 1
    compile: bool = False
    checkpoint_gradients: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    workers: int = 0
    sample_prompts: Sequence[str] = ("def ", "import ", "class ")
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and (value < 0 or value == 0 and name != "workers"):
                raise ValueError(f"{name}={value}: give a number above 0")
        _one_of("precision", self.precision, ("auto", "fp32", "bf16"))
        _one_of("accelerator", self.accelerator, ("auto", "cpu", "gpu"))


@dataclass(frozen=True, kw_only=True)
class LoggerSettings:
    """Where metrics go beside `metrics.jsonl`, which is always written."""

    kind: Literal["wandb", "tensorboard", "csv", "none"] = "wandb"
    project: str = "hybridlab"

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, ("wandb", "tensorboard", "csv", "none"))


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {allowed}")
