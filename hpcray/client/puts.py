"""`put`: values become objects, in a message if they are small and in shared memory if not."""

from __future__ import annotations

from typing import Any

from hpcray.client import serialization
from hpcray.client.core import Core
from hpcray.client.link import Link
from hpcray.client.memory import Memory
from hpcray.client.references import ObjectRef
from hpcray.protocol import values
from hpcray.protocol.sizes import check_refs


class Puts:
    def __init__(self, link: Link, core: Core, memory: Memory) -> None:
        self._link = link
        self._core = core
        self._memory = memory

    def put(self, value: Any) -> ObjectRef[Any]:
        packed = serialization.pack_atom(value, self._core.inline_max_bytes)
        return self.put_packed(packed) if packed else self.put_serialized(
            serialization.serialize(value))

    def put_packed(self, packed: bytes, contained: bytes = b"") -> ObjectRef[Any]:
        """`put` of a small packed value."""
        with self._link as link:
            if link.lost is not None:
                link.check()
            ref = self._core.put_inline(packed, contained)
            link.linger(len(packed) + len(contained))
        return ref

    def put_serialized(self, serialized: serialization.Serialized) -> ObjectRef[Any]:
        """
        Raises:
          ObjectStoreFullError: no room. ValueError: there are too many refs in it.
        """
        pickled, buffers, found = serialized
        contained = b"".join(found)
        check_refs(len(contained), "the value of this put holds")
        if serialized.nbytes <= self._core.inline_max_bytes:
            return self.put_packed(values.pack(pickled, buffers), contained)
        location = self._memory.write(serialized)
        with self._link as link:
            link.check()
            ref = self._core.put_located(location, contained)
            link.flush()
        return ref
