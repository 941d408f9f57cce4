"""The job's store of small facts, on node 0: bytes by namespace and key. Pure.

What must not go in: objects, which have homes and counts (node/directory.py).
"""

from __future__ import annotations

from typing import Any

_Keys = dict[bytes, bytes]


class KeyValue:
    def __init__(self) -> None:
        self._spaces: dict[bytes, _Keys] = {}

    def put(self, arguments: dict[str, Any]) -> bool:
        """Whether the key was there."""
        keys = self._spaces.setdefault(arguments["namespace"], {})
        there = arguments["key"] in keys
        if arguments["overwrite"] or not there:
            keys[arguments["key"]] = arguments["value"]
        return there

    def get(self, arguments: dict[str, Any]) -> bytes | None:
        return self._keys(arguments).get(arguments["key"])

    def exists(self, arguments: dict[str, Any]) -> bool:
        return arguments["key"] in self._keys(arguments)

    def delete(self, arguments: dict[str, Any]) -> int:
        """How many there were."""
        keys = self._keys(arguments)
        gone = self.list(arguments) if arguments["prefix"] else [arguments["key"]]
        count = sum(keys.pop(key, None) is not None for key in gone)
        if not keys:
            self._spaces.pop(arguments["namespace"], None)
        return count

    def list(self, arguments: dict[str, Any]) -> list[bytes]:
        return [key for key in self._keys(arguments) if key.startswith(arguments["key"])]

    def _keys(self, arguments: dict[str, Any]) -> _Keys:
        return self._spaces.get(arguments["namespace"], {})
