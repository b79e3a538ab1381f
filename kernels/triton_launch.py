"""Launch settings of Triton kernels: pinned per op, GPU and shape in `launch.json`, so that all ranks agree on them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

Settings = dict[str, Any]  # num_warps, num_stages, and the constexpr block sizes of one kernel
_forced: dict[str, Settings] = {}
asked: dict[str, str] = {}  # kernel -> the sizes it was last launched for; the tuner reads it


def settings(op: str, kernel: str, default: Settings, **sizes: int) -> Settings:
    """What to launch `kernel` of `op` with: `default`, over it the table's entry for this GPU and these sizes.

    A table reads {gpu name: {kernel: {"key=64,value=64": {"num_warps": 8}}}}; sizes stand in the order given here.
    """
    shape = ",".join(f"{name}={size}" for name, size in sizes.items())
    asked[kernel] = shape
    pinned = _table(op).get(_gpu(), {}).get(kernel, {}).get(shape, {})
    return default | pinned | _forced.get(kernel, {})


@contextmanager
def using(kernel: str, **chosen: Any) -> Iterator[None]:
    """Launch `kernel` with other settings for a while; for the tuner and for tests."""
    before = dict(_forced)
    _forced[kernel] = chosen
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _table(op: str) -> dict[str, Any]:
    path = Path(__file__).parent / op / "launch.json"
    return json.loads(path.read_text()) if path.exists() else {}


@cache
def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
