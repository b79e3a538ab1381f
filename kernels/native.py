"""C++ of ours, compiled on first use by the system's compiler, cached, loaded with ctypes: no torch headers."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

VARIABLE = "HYBRIDLAB_NATIVE"  # 0: compile and load nothing
COMPILERS = ("c++", "g++", "clang++")  # after $CXX
PATIENCE = 120  # seconds until a compiler counts as broken

_log = logging.getLogger("hybridlab.kernels")


class Missing(Exception):
    """Why there is no compiled code: a sentence."""


def missing(source: Path, *flags: str) -> str | None:
    """Why `library` would raise, or None; compiles what is not yet in the cache. Said once in the log."""
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE}=0"
    found = _load(source, flags)
    return found if isinstance(found, str) else None


def library(source: Path, *flags: str) -> ctypes.CDLL:
    """The shared library that `source` compiles to. Raises Missing."""
    if why := missing(source, *flags):
        raise Missing(why)
    return _load(source, flags)  # type: ignore[return-value]


@cache
def _load(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL | str:
    """One attempt per process."""
    try:
        compiler, version = _compiler()
        options = [*_options(), *flags]
        key = "\0".join((source.read_text(), *compiler, version, *options, _machine()))
        name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        folder = _folder()
        path = _find(folder, name) or _compile([*compiler, *options], source, folder, name)
        try:
            return ctypes.CDLL(str(path))
        finally:
            if folder != _cached():
                shutil.rmtree(folder)
    except (Missing, OSError) as error:
        _log.warning("no compiled kernels from %s: %s", source.name, error)
        return str(error)


def _compiler() -> tuple[list[str], str]:
    """The first compiler that answers, with what it says of its version."""
    chosen = os.environ.get("CXX")
    for command in [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]:
        if command and shutil.which(command[0]):
            said = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=PATIENCE)
            return command, said.stdout
    raise Missing(f"CXX={chosen!r} is not a command" if chosen else f"no C++ compiler: none of {', '.join(COMPILERS)}")


def _options() -> list[str]:
    """NaN keeps its meaning: nothing of -ffast-math but fused multiply-adds."""
    tuned = "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"
    return ["-std=c++17", "-O3", tuned, "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread"]


def _machine() -> str:
    """What `native` depends on: the kind of CPU and its instruction sets."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else [platform.processor()]
    kinds = ("flags", "Features", "model name", "CPU part")
    return "\n".join([platform.platform(), *sorted({line for line in lines if line.startswith(kinds)})])


def _cached() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "hybridlab" / "native"


def _folder() -> Path:
    """The cache, readable by the user alone; where none can be written, a new folder that goes after loading.

    Raises Missing when the cache is another user's, or others may write to it.
    """
    folder = _cached()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp())
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Missing(f"{folder} must belong to user {os.getuid()} and be writable by no other; chmod 700 it")
    return folder if os.access(folder, os.W_OK | os.X_OK) else Path(tempfile.mkdtemp())


def _find(folder: Path, name: str) -> Path | None:
    """The cached library: its file name holds the hash of its content, so that a damaged one is seen and removed."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        if path.lstat().st_uid != os.getuid():
            raise Missing(f"{path} belongs to user {path.lstat().st_uid}, not to {os.getuid()}; remove it")
        if path.name == _titled(name, path):
            return path
        path.unlink(missing_ok=True)
    return None


def _titled(name: str, path: Path) -> str:
    return f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.so"


def _compile(command: list[str], source: Path, folder: Path, name: str) -> Path:
    """Appears in the cache whole or not at all, whoever else compiles the same. Raises Missing with what was said."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "out.so"
        try:
            ran = subprocess.run(
                [*command, str(source), "-o", str(made)], capture_output=True, text=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            raise Missing(f"{command[0]} did not finish within {PATIENCE} s") from None
        if ran.returncode or not made.exists():
            said = "\n".join(ran.stderr.splitlines()[:5])
            raise Missing(f"{command[0]} failed on {source.name} with status {ran.returncode}: {said}")
        return made.rename(folder / _titled(name, made))
