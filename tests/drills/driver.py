"""Imports everything once, then runs `train.py` in a fork for every JSON list of overrides read from standard input.

Prints the fork's process id, then its exit status as `os.waitstatus_to_exitcode` gives it.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import lightning  # noqa: F401
import matplotlib.figure  # noqa: F401

from hybridlab.config import main
from hybridlab.training import loggers, module, parallel, report  # noqa: F401
from hybridlab.training.callbacks import recording  # noqa: F401
from hybridlab.training.run import fit

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def child(overrides: list[str], log: str) -> int:
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    try:
        return main(fit, CONFIGS, overrides)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1


for line in sys.stdin:
    overrides, log = json.loads(line)
    pid = os.fork()
    if pid == 0:
        code = child(overrides, log)
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
