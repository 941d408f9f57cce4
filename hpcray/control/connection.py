"""One connection to the control store. The only module that imports the Redis client.

The import happens on first use, not at module level: it takes 170 ms, which the
writer's thread can spend while the node goes on starting.

Timeouts are short because every user of this module can try again. The client's own
retries are switched off: they block for seconds and would repeat commands that the
writer repeats anyway, in an order it controls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpcray.control.address import ControlAddress

if TYPE_CHECKING:
    import redis

CONNECT_TIMEOUT_S = 2.0
# A Redis that has not answered a batch by then counts as lost, stopped ones included.
ANSWER_TIMEOUT_S = 5.0


def client(address: ControlAddress) -> redis.Redis:
    """A synchronous client. Connects on first use; raises, and never retries by itself."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    where: dict[str, Any] = (
        {"unix_socket_path": address.unix_path} if address.unix_path
        else {"host": address.host, "port": address.port, "ssl": address.tls}
    )
    return redis.Redis(
        **where, db=address.database, username=address.username or None,
        password=address.password or None, retry=Retry(NoBackoff(), 0),
        socket_connect_timeout=CONNECT_TIMEOUT_S, socket_timeout=ANSWER_TIMEOUT_S,
        # RESP2: what we read needs no more, and Redis 5 knows no other.
        protocol=2,
    )


def transient_errors() -> tuple[type[Exception], ...]:
    """What a lost, slow or refusing Redis raises; anything else is a bug of ours."""
    import redis

    return (redis.RedisError, OSError)


def is_refusal(error: Exception) -> bool:
    """Whether Redis understood the command and cannot carry it out *now*.

    Out of memory, loading, a replica, a failed disk: worth another try later. The other
    error replies (a wrong type, a wrong id) will not get better.
    """
    text = f"{type(error).__name__} {error}".upper()
    return any(word in text for word in (
        "OOM", "OUTOFMEMORY", "MAXMEMORY", "LOADING", "BUSY", "READONLY", "READ ONLY", "MISCONF",
        "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "NOAUTH", "NOPERM", "NOREPLICAS",
    ))


def is_out_of_memory(error: Exception) -> bool:
    text = f"{type(error).__name__} {error}".upper()
    return any(word in text for word in ("OOM", "OUTOFMEMORY", "MAXMEMORY"))
