"""No test reaches the network, and none of what a test starts does."""

import os
import signal
import socket
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is defined; versions for GPUs are still only run by name
    os.environ["TRITON_INTERPRET"] = "1"

GUARD = '''"""Refuse every connection but local sockets and loopback; print a line that tests look for."""
import socket

_connect = socket.socket.connect


def connect(self, address):
    if self.family == socket.AF_UNIX or str(address[0]) in ("127.0.0.1", "::1", "localhost"):
        return _connect(self, address)
    raise OSError(f"NETWORK REACHED: {address}")


socket.socket.connect = socket.socket.connect_ex = connect
'''


# A shell that runs us in the background, or nohup, has signals ignored; the drills send them and expect them heard.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def no_network(tmp_path_factory):
    """Patched here, and through `sitecustomize` in subprocesses; no account of the user's is seen either."""
    folder: Path = tmp_path_factory.mktemp("guard")
    (folder / "sitecustomize.py").write_text(GUARD)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HYBRIDLAB_KERNELS"):
        os.environ.pop(name, None)
    os.environ["NETRC"] = str(folder / "netrc")
    before = socket.socket.connect, socket.socket.connect_ex
    exec(GUARD, {})
    yield
    socket.socket.connect, socket.socket.connect_ex = before
