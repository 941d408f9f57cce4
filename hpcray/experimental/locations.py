"""Where objects are: the nodes that have one in shared memory. Asks; moves nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from hpcray.client import process
from hpcray.client.client import Client
from hpcray.client.references import ObjectRef
from hpcray.exceptions import GetTimeoutError
from hpcray.protocol import ids

# Ids in one question: its answer must fit into a datagram, on a thousand nodes too.
_IDS_PER_REQUEST = 40


def get_object_locations(
    obj_refs: Sequence[ObjectRef[Any]], timeout_ms: int = -1
) -> dict[ObjectRef[Any], dict[str, Any]]:
    """For each ref: {"node_ids": [...], "object_size": bytes or None, "did_spill": False}.

    `node_ids` are the nodes with a copy in shared memory; none for a small object, which travels
    inside messages, and for one that is not made yet, whose size is None. A ref whose object is
    gone is left out.

    Args:
      timeout_ms: how long to wait for the answer; negative: until it comes.

    Raises:
      GetTimeoutError: no answer in time.
      RuntimeError: there is no session.
    """
    client = _checked(obj_refs)
    deadline_s = None if timeout_ms < 0 else time.monotonic() + timeout_ms / 1000
    by_home: dict[int, list[ObjectRef[Any]]] = {}
    for ref in obj_refs:
        by_home.setdefault(ids.home_of_object(ref.binary()), []).append(ref)
    found: dict[ObjectRef[Any], dict[str, Any]] = {}
    for refs in by_home.values():
        for start in range(0, len(refs), _IDS_PER_REQUEST):
            some = refs[start : start + _IDS_PER_REQUEST]
            left_s = None if deadline_s is None else max(deadline_s - time.monotonic(), 0.0)
            try:
                answer = client.request("locations", _ids(some), left_s)
            except GetTimeoutError:
                raise GetTimeoutError(
                    f"the locations of {len(obj_refs)} objects were not found within "
                    f"{timeout_ms} ms") from None
            found.update(_read(client, some, answer))
    return {ref: found[ref] for ref in obj_refs if ref in found}


def get_local_object_locations(
    obj_refs: Sequence[ObjectRef[Any]],
) -> dict[ObjectRef[Any], dict[str, Any]]:
    """The same, as far as this node knows: it asks no other."""
    client = _checked(obj_refs)
    found: dict[ObjectRef[Any], dict[str, Any]] = {}
    for start in range(0, len(obj_refs), _IDS_PER_REQUEST):
        some = obj_refs[start : start + _IDS_PER_REQUEST]
        found.update(_read(client, some, client.request("local_locations", _ids(some))))
    return found


def _checked(obj_refs: Sequence[ObjectRef[Any]]) -> Client:
    if isinstance(obj_refs, ObjectRef) or not isinstance(obj_refs, (list, tuple)):
        raise TypeError(f"obj_refs must be a list of ObjectRefs, not {type(obj_refs).__name__}")
    for ref in obj_refs:
        if not isinstance(ref, ObjectRef):
            raise TypeError(f"obj_refs must be a list of ObjectRefs; it holds {ref!r}")
    client = process.client
    if client is None:
        raise RuntimeError("hpcray is not initialised: call init() first")
    return client


def _ids(refs: Sequence[ObjectRef[Any]]) -> dict[str, bytes]:
    return {"ids": b"".join(ref.binary() for ref in refs)}


def _read(
    client: Client, refs: Sequence[ObjectRef[Any]],
    answer: list[tuple[list[int], int | None] | None],
) -> dict[ObjectRef[Any], dict[str, Any]]:
    key = client.session["job_key"]
    return {
        ref: {"node_ids": [ids.node_id_hex(rank, key) for rank in known[0]],
              "object_size": known[1], "did_spill": False}
        for ref, known in zip(refs, answer, strict=True) if known is not None
    }


__all__ = ["get_local_object_locations", "get_object_locations"]
