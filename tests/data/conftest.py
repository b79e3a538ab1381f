import socket

import pytest


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing here may connect to anything."""

    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
