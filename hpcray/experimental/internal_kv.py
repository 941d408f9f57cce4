"""One store of keys and values for the whole job, under Ray's half-public names.

For settings and small facts that all processes should see: node 0 keeps it, every call asks it,
and it ends with the job. Keys and values are bytes (text is encoded as UTF-8), both together up to
1 MiB. Objects belong into `put`.
"""

from typing import Any

from hpcray.client import process

# Underscores and all: these are the names that programs import.


def _internal_kv_initialized() -> bool:
    """Whether it can be asked: this process has a session."""
    return process.client is not None


def _internal_kv_put(
    key: str | bytes, value: str | bytes, overwrite: bool = True, *,
    namespace: str | bytes | None = None,
) -> bool:
    """Keep the value. Whether there was one already: without `overwrite` that one stays."""
    return bool(_ask("kv_put", namespace, key=_bytes("key", key), value=_bytes("value", value),
                     overwrite=bool(overwrite)))


def _internal_kv_get(
    key: str | bytes, *, namespace: str | bytes | None = None
) -> bytes | None:
    """The value, None if there is none."""
    found: bytes | None = _ask("kv_get", namespace, key=_bytes("key", key))
    return found


def _internal_kv_exists(key: str | bytes, *, namespace: str | bytes | None = None) -> bool:
    return bool(_ask("kv_exists", namespace, key=_bytes("key", key)))


def _internal_kv_del(
    key: str | bytes, *, del_by_prefix: bool = False, namespace: str | bytes | None = None
) -> int:
    """Forget the key, or all keys that begin with it; how many there were."""
    return int(_ask("kv_delete", namespace, key=_bytes("key", key), prefix=bool(del_by_prefix)))


def _internal_kv_list(
    prefix: str | bytes, *, namespace: str | bytes | None = None
) -> list[bytes]:
    """The keys that begin with it, in no order that is promised."""
    return list(_ask("kv_list", namespace, key=_bytes("prefix", prefix)))


def _internal_kv_reset() -> None:
    """Nothing: the store is the session's."""


def _ask(request: str, namespace: str | bytes | None, **arguments: Any) -> Any:
    within = b"" if namespace is None else _bytes("namespace", namespace)
    return process.current_client().request(request, {"namespace": within, **arguments})


def _bytes(what: str, given: str | bytes) -> bytes:
    if isinstance(given, str):
        return given.encode()
    if not isinstance(given, bytes):
        raise TypeError(f"the {what} is bytes or str, not {type(given).__name__}")
    return given
