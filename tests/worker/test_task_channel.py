"""A worker's end of its task channel; the test is the node."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from hpcray.transport import datagrams
from hpcray.worker.channel import TaskChannel


def test_what_cannot_be_read_ends_the_worker_and_is_said(
    capsys: pytest.CaptureFixture[str]
) -> None:
    """The calls in it are lost: their callers hear of the worker's end."""
    ours, node = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, node:
        node.send(b"\x91\x05")
        channel: Any = SimpleNamespace(socket=ours, _buffer=datagrams.receive_buffer())
        with pytest.raises(datagrams.ChannelClosed):
            TaskChannel.read(channel, wait=False)
    assert "a worker ends: what its node sent cannot be read" in capsys.readouterr().err
