"""Who may use a run folder, where a run starts in it, and how it is asked to stop. Imports nothing heavy."""

import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridlab import checkpoint
from hybridlab.config import HASHED


class Refused(Exception):
    """The run cannot start as asked; the message says why and what to do."""


class Stop:
    """Signals and the time limit, kept until the step at hand is done. A second Ctrl-C exits at once.

    Before training starts there is nothing to save, and a signal exits immediately.
    """

    def __init__(self, minutes: float | None):
        self.signal, self.training = 0, False
        self.deadline = time.monotonic() + 60 * minutes if minutes else None

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self.receive)

    def receive(self, number: int, frame: object) -> None:
        if self.signal == number == signal.SIGINT:
            os._exit(130)
        self.signal = number
        if not self.training:
            raise SystemExit(128 + number)

    def requested(self) -> bool:
        return bool(self.signal) or (self.deadline is not None and time.monotonic() > self.deadline)


class Lock:
    """One run per folder. The system frees it when its holder dies, however it dies; children do not hold it."""

    def __init__(self, run_dir: Path):
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / ".lock"

    def __enter__(self) -> None:
        self.file = self.path.open("a+")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            where = f"{self.path.parent} is in use by {self.path.read_text()}"
            raise Refused(f"{where}; wait for it, or give another run_dir") from None
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {os.uname().nodename}")
        self.file.flush()

    def __exit__(self, *_: object) -> None:
        self.file.close()


def start(config: dict[str, Any], run_dir: Path) -> Path | None:
    """The checkpoint to continue from, None for a new run; raises Refused where the two configs are not one run's."""
    resume, before, where = config["resume"], read(run_dir / "run.json").get("config"), run_dir
    if resume == "never" and before:
        raise Refused(f"resume=never, but {run_dir} holds a run; give another run_dir, or remove it, or resume=auto")
    if not any(run_dir.glob("checkpoints/step-*")):
        if resume in ("auto", "never"):
            if before:
                _same_run(before, config, run_dir)
            return None
        where = Path(resume)
    folder = checkpoint.find(where, say=lambda line: print(line, file=sys.stderr))
    _same_run(checkpoint.load_config(folder), config, folder)
    return folder


def _same_run(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    old, new = (dict(pair for key in HASHED for pair in _flat(config[key], key)) for config in (before, now))
    lines = [
        f"  {key}: {old.get(key, 'not set')!r} there, {new.get(key, 'not set')!r} now"
        for key in {**old, **new} if old.get(key) != new.get(key)
    ]  # fmt: skip
    if lines:
        raise Refused(
            f"{where} was trained with another configuration:\n" + "\n".join(lines[:20]) + "\n"
            "give another run_dir to start anew, or init_from to take over its weights only"
        )


def _flat(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for name, part in node.items():
            yield from _flat(part, f"{key}.{name}")
    else:
        yield key, node


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, text: str) -> None:
    """Replace a small file so that a kill leaves the old or the new one."""
    temp = path.with_suffix(".tmp")
    temp.write_text(text)
    temp.replace(path)
