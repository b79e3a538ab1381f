"""How published code is fetched and run in part, and what it is run on."""

import ast
import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SEED = 20260316
REQUIREMENTS = Path(__file__).parent / "requirements.txt"
BUILD = ["packaging", "setuptools", "wheel"]
PEERS = ["fla-core", "mamba-ssm", "mambapy"]
Args = dict[str, Tensor]


class Draw:
    """Random arguments in our layout: batch 2, a length that no chunk divides unless told, 2 heads."""

    def __init__(self, name: str, time: int = 37):
        self.generator = torch.Generator().manual_seed(SEED + sum(name.encode()))
        self.time = time

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def tokens(self, *shape: int) -> Tensor:
        return self.normal(2, self.time, *shape)

    def log_decay(self, *shape: int) -> Tensor:
        return F.logsigmoid(self.tokens(*shape) + 1)

    def linear(self, *decay: int, key: int = 4, value: int = 3, heads: int = 2) -> Args:
        """Arguments of linear_recurrence; `decay` is what follows [batch, time] in its shape, none if empty."""
        args = {"q": self.tokens(heads, key), "k": self.tokens(heads, key), "v": self.tokens(heads, value)}
        args |= {"log_decay": self.log_decay(*decay)} if decay else {}
        return args | {"state": self.normal(2, heads, key, value)}

    def delta(self, *decay: int) -> Args:
        """Arguments of delta_rule: keys of unit length."""
        args = self.linear(*decay)
        return args | {"k": F.normalize(args["k"], dim=-1), "beta": self.tokens(2).sigmoid()}


def install(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target",
           str(folder), "-c", str(REQUIREMENTS)]  # fmt: skip
    pure = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "MAMBA_FORCE_BUILD": "TRUE", "PYTHONPATH": str(folder)}
    subprocess.run([*pip, *BUILD], check=True)
    subprocess.run([*pip, "--no-build-isolation", *PEERS], check=True, env=os.environ | pure)


def lift(path: Path, known: dict[str, Any], *names: str) -> list[Any]:
    """Functions and classes of one file by name, without running the rest of it, which needs a GPU."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    space = dict(known)
    exec(compile(tree, str(path), "exec"), space)
    return [space[name] for name in names]


def load(path: Path) -> Any:
    """One file as a module, without the packages around it."""
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def float32_is_float64() -> Iterator[None]:
    single, method = torch.float32, Tensor.float
    torch.float32 = torch.float = torch.float64
    Tensor.float = Tensor.double
    yield
    torch.float32 = torch.float = single
    Tensor.float = method
