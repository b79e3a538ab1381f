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
    """One run per folder. The system frees it when its holder dies, however it dies."""

    def __init__(self, run_dir: Path):
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / ".lock"

    def __enter__(self) -> None:
        self.file = self.path.open("a+")
        for _ in range(100):
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                host, pid = (self.path.read_text().split() + ["?", "?"])[:2]
                if host != os.uname().nodename or Path(f"/proc/{pid}").exists():
                    raise Refused(
                        f"{self.path.parent} is in use by process {pid} on {host}; wait for it, or give another run_dir"
                    ) from None
                time.sleep(0.1)  # its children are about to notice that it died
        self.file.truncate(0)
        self.file.write(f"{os.uname().nodename} {os.getpid()}")
        self.file.flush()

    def __exit__(self, *_: object) -> None:
        self.file.close()


def start(config: dict[str, Any], run_dir: Path) -> Path | None:
    """The checkpoint to continue from, None for a new run; raises Refused where the two configs are not one run's."""
    own = run_dir / "checkpoints"
    if config["resume"] == "never" and (run_dir / "run.json").exists():
        raise Refused(f"resume=never, but {run_dir} holds a run; give another run_dir, or remove it, or resume=auto")
    where = run_dir if own.is_dir() and any(own.glob("step-*")) else None
    if where is None and config["resume"] not in ("auto", "never"):
        where = Path(config["resume"])
    if where is None:
        before = read(run_dir / "run.json").get("config")
        return None if before is None else _same_run(before, config, run_dir)
    folder = checkpoint.find(where, say=lambda line: print(line, file=sys.stderr))
    _same_run(checkpoint.load_config(folder), config, folder)
    return folder


def _same_run(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    old, new = ({k: v for key in HASHED for k, v in _flat(c[key], key)} for c in (before, now))
    differ = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    if differ:
        lines = [f"  {k}: {old.get(k, 'not set')!r} there, {new.get(k, 'not set')!r} now" for k in differ]
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
