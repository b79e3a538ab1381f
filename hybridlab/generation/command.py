"""What the command lines of this package share: KEY=VALUE arguments taken verbatim, and refusals in one line."""

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

COMMON: dict[str, Any] = {"run": str, "device": str, "trust": lambda value: value.split(",")}


def read_options(args: Sequence[str], kinds: Mapping[str, Callable[[str], Any]]) -> list[tuple[str, Any]]:
    """KEY=VALUE arguments in order, values verbatim through their kind. Raises ValueError."""
    found, kinds = [], {**COMMON, **kinds}
    for arg in args:
        key, equals, value = arg.partition("=")
        if not equals or key not in kinds:
            near = "".join(f"; nearest: {name}" for name in get_close_matches(key, kinds, n=1))
            raise ValueError(f"{arg}: give KEY=VALUE with a key of {', '.join(kinds)}{near}")
        try:
            found.append((key, kinds[key](value)))
        except ValueError as error:
            raise ValueError(f"{key}={value}: {error}") from error
    if "run" not in dict(found):
        raise ValueError("run=PATH is missing: name a run folder or a checkpoint")
    return found


def count(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ValueError("it must be a whole number, 1 or more")
    return int(value)


def load(options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer of `run`, on the GPU where there is one and `device` names no other."""
    import torch

    from hybridlab.checkpoint import load_model

    model, tokenizer = load_model(options["run"], trusted=options.get("trust", ()))
    device = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device}: {str(error).splitlines()[0]}") from error


def command(run: Callable[[Sequence[str]], None], doc: str | None, args: Sequence[str], *refusals: Any) -> int:
    """Run a command line; returns its exit code: 2, and a line that says why, for what is refused."""
    if {"-h", "--help"} & set(args):
        print(doc)
        return 0
    warnings.showwarning = lambda message, *_, **__: print(message, file=sys.stderr)
    try:
        run(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains while it exits
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, *refusals) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    return 0
