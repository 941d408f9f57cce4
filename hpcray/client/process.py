"""Which client this process has: none yet, its own, or (in a fork) none any more.

What is looked up here must be of the whole process: the face has no other way to find the client,
and user code that was forked must not use its parent's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from hpcray.client import references

if TYPE_CHECKING:
    from hpcray.client.client import Client

client: Client | None = None  # read directly on hot paths
_connect: Callable[[], Client] | None = None


def set_client(new: Client | None) -> None:
    global client
    client = new
    references.set_table(None if new is None else new.refs)


def set_connector(connect: Callable[[], Client]) -> None:
    """How the first use without `init()` gets its client (the face sets this)."""
    global _connect
    _connect = connect


def current_client() -> Client:
    """The client of this process; connects on first use, as Ray's implicit `init` does."""
    if client is not None:
        return client
    if _connect is None:
        raise RuntimeError("hpcray is not initialised in this process")
    return _connect()


def _after_fork_in_child() -> None:
    # The child shares the socket but may not use it: its client is dead, its finalisers silent.
    if client is not None:
        client.forked()
        set_client(None)
        references.forked()


references.set_connector(lambda: current_client().refs)
os.register_at_fork(after_in_child=_after_fork_in_child)
