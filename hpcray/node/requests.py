"""The slow path: what clients ask rarely, by name. Pure.

A request is answered here, at node 0 (names, cluster facts) or at an actor's home; forwarded
requests keep the asking client's number until the answer comes back. Names:

    nodes  cluster_resources  available_resources  statistics            facts
    reserve_name  release_name  get_actor  list_named_actors             names, at node 0
    kill_actor  actor_handle                                             at the actor's home
    cancel                                                               at the task's home
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpcray.node.outbox import Outbox
from hpcray.protocol import ids
from hpcray.protocol.messages import PeerReply, PeerRequest, Reply, Request
from hpcray.protocol.values import Failure

if TYPE_CHECKING:
    from hpcray.node.machine import Machine

NAMES_RANK = 0


class RequestError(Exception):
    """Becomes the reply's error: `kind` as in `hpcray.exceptions`, or a built-in's name."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(kind, message)


class Requests:
    def __init__(self, machine: Machine, outbox: Outbox) -> None:
        self._machine = machine
        self._outbox = outbox
        # Forwarded: our number -> (client, its number), or None if nobody waits.
        self._forwarded: dict[int, tuple[int, int] | None] = {}
        self._count = 0
        # Node 0: (namespace, name) -> {"actor_id", "handle", "detached"}.
        self.names: dict[tuple[str, str], dict[str, Any]] = {}
        self.name_changes: list[tuple[str, str, bytes | None]] = []
        self._handlers: dict[str, Callable[[Any], Any]] = {
            "nodes": self._nodes,
            "cluster_resources": self._cluster_resources,
            "available_resources": self._available_resources,
            "reserve_name": self._reserve_name,
            "release_name": self._release_name,
            "get_actor": self._get_actor,
            "list_named_actors": self._list_named_actors,
            "actor_handle": self._actor_handle,
            "kill_actor": self._kill_actor,
            "cancel": self._cancel,
            "statistics": lambda _: self._machine.statistics(),
        }

    # --- routing ----------------------------------------------------------------------------------

    def asked(self, client: int, message: Request) -> None:
        rank = self._rank_for(message.name, message.arguments)
        if rank == self._machine.rank:
            result, error = self._answer(message.name, message.arguments)
            self._outbox.clients[client].append(Reply(message.request, result, error))
        else:
            self._forward(rank, message.name, message.arguments, (client, message.request))

    def _forward(
        self, rank: int, name: str, arguments: Any, asker: tuple[int, int] | None
    ) -> None:
        self._count += 1
        self._forwarded[self._count] = asker
        self._outbox.peers[rank].append(PeerRequest(self._count, name, arguments))

    def _rank_for(self, name: str, arguments: Any) -> int:
        if name in ("kill_actor", "actor_handle"):
            return ids.home_of_actor(arguments["actor_id"])
        if name == "cancel":
            return ids.home_of_object(arguments["object_id"])
        if name == "statistics":
            return self._machine.rank
        return NAMES_RANK

    def peer_asked(self, rank: int, message: PeerRequest) -> None:
        result, error = self._answer(message.name, message.arguments)
        self._outbox.peers[rank].append(PeerReply(message.request, result, error))

    def peer_answered(self, message: PeerReply) -> None:
        asker = self._forwarded.pop(message.request, None)
        if asker is not None and asker[0] in self._machine.clients:
            self._outbox.clients[asker[0]].append(Reply(asker[1], message.result, message.error))

    def _answer(self, name: str, arguments: Any) -> tuple[Any, Failure | None]:
        handler = self._handlers.get(name)
        if handler is None:
            return None, Failure("ValueError", f"the node knows no request {name!r}")
        try:
            return handler(arguments), None
        except RequestError as error:
            return None, error.failure

    # --- facts ------------------------------------------------------------------------------------

    def _nodes(self, _: Any) -> list[dict[str, Any]]:
        session = self._machine.session
        return [
            {
                "rank": node.rank, "host": node.host, "address": node.address, "alive": True,
                "pid": node.pid, "resources": dict(node.resources), "labels": dict(node.labels),
                "node_id": session["node_ids"][node.rank],
            }
            for _, node in sorted(self._machine.cluster.nodes.items())
        ]

    def _cluster_resources(self, _: Any) -> dict[str, int]:
        total: dict[str, int] = {}
        for node in self._machine.cluster.nodes.values():
            for name, amount in node.resources:
                total[name] = total.get(name, 0) + amount
        return total

    def _available_resources(self, _: Any) -> dict[str, int]:
        free = {n: a for n, a in self._machine.dispatcher.ledger.free.items() if a > 0}
        scheduler = self._machine.cluster.scheduler
        if scheduler is not None:
            for rank, view in scheduler.views.items():
                if rank != self._machine.rank:
                    for name, amount in view.free.items():
                        free[name] = free.get(name, 0) + max(amount, 0)
        return {name: amount for name, amount in free.items() if amount > 0}

    # --- names ------------------------------------------------------------------------------------

    def _reserve_name(self, arguments: Any) -> dict[str, Any] | None:
        key = (arguments["namespace"], arguments["name"])
        entry = self.names.get(key)
        if entry is not None:
            if arguments.get("get_if_exists"):
                return {"actor_id": entry["actor_id"], "handle": entry["handle"]}
            raise RequestError(
                "ValueError",
                f"The name {key[1]!r} (namespace={key[0]}) is already taken. Please use a "
                "different name, or get_if_exists=True, or get the actor with "
                f"hpcray.get_actor({key[1]!r}).")
        self.names[key] = {
            "actor_id": arguments["actor_id"], "handle": arguments["handle"],
            "detached": arguments.get("detached", False),
        }
        self.name_changes.append((*key, arguments["actor_id"]))
        return None

    def _release_name(self, arguments: Any) -> None:
        key = (arguments["namespace"], arguments["name"])
        entry = self.names.get(key)
        if entry is not None and entry["actor_id"] == arguments["actor_id"]:
            del self.names[key]
            self.name_changes.append((*key, None))

    def actor_died(self, actor_id: bytes, namespace: str, name: str) -> None:
        if not name:
            return
        arguments = {"actor_id": actor_id, "namespace": namespace, "name": name}
        if self._machine.rank == NAMES_RANK:
            self._release_name(arguments)
        else:
            self._forward(NAMES_RANK, "release_name", arguments, None)

    def _get_actor(self, arguments: Any) -> dict[str, Any]:
        key = (arguments["namespace"], arguments["name"])
        entry = self.names.get(key)
        if entry is None:
            raise RequestError(
                "ValueError",
                f"Failed to look up actor with name '{key[1]}'. This could be because 1. You are "
                "trying to look up a named actor you didn't create. 2. The named actor died. "
                f"3. You did not use the namespace it is in (looked in {key[0]!r}).")
        return {"actor_id": entry["actor_id"], "handle": entry["handle"]}

    def _list_named_actors(self, arguments: Any) -> list[dict[str, str]]:
        everywhere = arguments.get("all_namespaces", False)
        return [
            {"namespace": namespace, "name": name}
            for namespace, name in self.names
            if everywhere or namespace == arguments.get("namespace")
        ]

    # --- acts -------------------------------------------------------------------------------------

    def _actor_handle(self, arguments: Any) -> dict[str, Any]:
        home = self._machine.actors.homes.get(arguments["actor_id"])
        if home is None:
            raise RequestError("ValueError", "there is no such actor (any more)")
        return {"actor_id": home.actor_id, "handle": home.handle, "name": home.name}

    def _kill_actor(self, arguments: Any) -> None:
        self._machine.actors.kill(
            arguments["actor_id"], no_restart=arguments.get("no_restart", True))

    def _cancel(self, arguments: Any) -> str:
        return self._machine.tasks.cancel(
            ids.task_of_object(arguments["object_id"]), force=bool(arguments.get("force")),
            recursive=bool(arguments.get("recursive")))
