"""The names of actors, on node 0. Pure.

    reserve --> RESERVED --created (from the actor's home)--> CREATED --release--> gone
                   +--------------- release: its creator died -----------------------^

A name is reserved before its actor exists, so that only one of several creators goes on. Whoever
asks for it meanwhile waits: a handle given out before the home knows the actor would hold nothing.
So does whoever the home has told that the actor is ending: the name is free when it is dead.
"""

from __future__ import annotations

from typing import Any

from hpcray.protocol.values import Failure

# Who has asked: (rank, client or -1, its number of the request).
Asker = tuple[int, int, int]
Key = tuple[str, str]  # namespace, name


class RequestError(Exception):
    """Becomes the reply's error: `kind` as in `hpcray.exceptions`, or a built-in's name."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(kind, message)


class NotYet(Exception):
    """The answer must wait for this entry."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self.entry = entry


class Entry:
    __slots__ = ("actor_id", "created", "handle", "waiting")

    def __init__(self, actor_id: bytes, handle: bytes) -> None:
        self.actor_id = actor_id
        self.handle = handle
        self.created = False
        # (request's name, arguments, asker) of those who must wait.
        self.waiting: list[tuple[str, Any, Asker]] = []

    def facts(self, ending: bytes) -> dict[str, Any]:
        """`ending`: the asker knows that this actor will be of no use."""
        if not self.created or self.actor_id == ending:
            raise NotYet(self)
        return {"actor_id": self.actor_id, "handle": self.handle}


class Names:
    def __init__(self) -> None:
        self.entries: dict[Key, Entry] = {}
        # For the control store: (namespace, name, actor or None).
        self.changes: list[tuple[str, str, bytes | None]] = []

    def reserve(self, arguments: Any) -> dict[str, Any] | None:
        """None: it is the asker's, who creates the actor now; else the actor there is."""
        key = (arguments["namespace"], arguments["name"])
        entry = self.entries.get(key)
        if entry is None:
            self.entries[key] = Entry(arguments["actor_id"], arguments["handle"])
            self.changes.append((*key, arguments["actor_id"]))
            return None
        if not entry.created and not arguments.get("get_if_exists"):
            raise already_taken(arguments)
        return entry.facts(arguments.get("ending", b""))

    def created(self, arguments: Any) -> list[tuple[str, Any, Asker]]:
        """Its home knows the actor; who waits can be answered now."""
        entry = self._entry(arguments)
        if entry is None:
            return []
        entry.created = True
        waiting, entry.waiting = entry.waiting, []
        return waiting

    def release(self, arguments: Any) -> list[tuple[str, Any, Asker]]:
        """The actor is dead, or never came to be; who waits can be answered now."""
        entry = self._entry(arguments)
        if entry is None:
            return []
        key = (arguments["namespace"], arguments["name"])
        del self.entries[key]
        self.changes.append((*key, None))
        return entry.waiting

    def _entry(self, arguments: Any) -> Entry | None:
        entry = self.entries.get((arguments["namespace"], arguments["name"]))
        return entry if entry is not None and entry.actor_id == arguments["actor_id"] else None

    def find(self, arguments: Any) -> dict[str, Any]:
        entry = self.entries.get((arguments["namespace"], arguments["name"]))
        if entry is None:
            raise RequestError(
                "ValueError",
                f"Failed to look up actor with name '{arguments['name']}'. This could be because "
                "1. You are trying to look up a named actor you didn't create. 2. The named actor "
                "died. 3. You did not use the namespace it is in (looked in "
                f"{arguments['namespace']!r}).")
        return entry.facts(arguments.get("ending", b""))

    def list(self, arguments: Any) -> list[dict[str, str]]:
        everywhere = arguments.get("all_namespaces", False)
        return [
            {"namespace": namespace, "name": name}
            for (namespace, name), entry in self.entries.items()
            if entry.created and (everywhere or namespace == arguments.get("namespace"))
        ]


def already_taken(arguments: Any) -> RequestError:
    name = arguments["name"]
    return RequestError(
        "ActorAlreadyExistsError",
        f"The name {name!r} (namespace={arguments['namespace']}) is already taken. Please use a "
        "different name, or get_if_exists=True, or get the actor with "
        f"hpcray.get_actor({name!r}).")
