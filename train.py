"""python train.py +config=NAME [key=value ...]: compose, check, train. Exit code 2: the configuration is bad."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hybridlab.config import main


def run(config: dict[str, Any], parts: SimpleNamespace) -> int:
    # Imports lightning, which takes seconds: only now, when the configuration is known to be good.
    from hybridlab.training.run import fit

    return fit(config, parts)


if __name__ == "__main__":
    sys.exit(main(run, Path(__file__).resolve().parent / "configs"))
