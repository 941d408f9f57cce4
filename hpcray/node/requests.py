"""The slow path: what clients ask rarely, by name. Pure.

A request is answered here, at node 0 (names, cluster facts) or at an actor's home; forwarded
requests keep the asking client's number until the answer comes back. Names:

    nodes  cluster_resources  available_resources  statistics            facts
    reserve_name  name_created  release_name  get_actor  list_named_actors   names, at node 0
    create_placement_group  remove_placement_group  placement_groups     groups, at node 0
    kill_actor  actor_handle                                             at the actor's home
    cancel                                                               at the task's home
    explain {ids}          why objects are not there yet, a sentence each: see node/explain.py
    holdings {names}       of resources: what is free when tasks have ended, who keeps the rest
    locations  local_locations                      at the objects' home; at the asker's node
    state                              what there is, at every node: see node/inventory.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from hpcray.node.names import Asker, Names, NotYet, RequestError
from hpcray.node.outbox import Outbox
from hpcray.protocol import ids, labels
from hpcray.protocol.messages import (
    PeerReply,
    PeerRequest,
    Reply,
    Request,
    Rows,
    encode,
)
from hpcray.protocol.sizes import ROWS_BYTES
from hpcray.protocol.values import Failure

if TYPE_CHECKING:
    from hpcray.node.machine import Machine

NAMES_RANK = 0


def parts(rows: list[Any]) -> Iterator[list[Any]]:
    """A long list in lists that fit into a datagram each."""
    part: list[Any] = []
    nbytes = 0
    for row in rows:
        size = len(encode(row))
        if part and nbytes + size > ROWS_BYTES:
            yield part
            part, nbytes = [], 0
        part.append(row)
        nbytes += size
    if part:
        yield part


class Reservation:
    __slots__ = ("actor_id", "granted", "name", "namespace")

    def __init__(self, actor_id: bytes, namespace: str, name: str) -> None:
        self.actor_id = actor_id
        self.namespace = namespace
        self.name = name
        self.granted = False


class Requests:
    def __init__(self, machine: Machine, outbox: Outbox) -> None:
        self._machine = machine
        self._outbox = outbox
        # Forwarded: our number -> who asked or what to call, or None if nobody waits.
        self._forwarded: dict[int, Asker | Callable[[PeerReply], None] | None] = {}
        self._count = 0
        self.names = Names()  # used on node 0
        # Names asked for here whose actors are not created yet: (client, its number) -> which.
        self._reserving: dict[tuple[int, int], Reservation] = {}
        self._handlers: dict[str, Callable[[Any], Any]] = {
            "nodes": self._nodes,
            "cluster_resources": self._cluster_resources,
            "available_resources": self._available_resources,
            "reserve_name": self.names.reserve,
            "name_created": self._name_created,
            "release_name": self._release_name,
            "get_actor": self.names.find,
            "list_named_actors": self.names.list,
            "actor_handle": self._actor_handle,
            "kill_actor": self._kill_actor,
            "cancel": self._cancel,
            "create_placement_group": machine.groups.create,
            "remove_placement_group": machine.groups.remove,
            "placement_groups": machine.groups.table,
            "locations": lambda arguments: self._machine.inventory.locations(arguments),
            "local_locations": lambda arguments: self._machine.inventory.locations(arguments),
            "holdings": lambda arguments: self._machine.waiting.holdings(arguments["names"]),
            "statistics": lambda _: self._machine.statistics(),
        }

    # --- routing ----------------------------------------------------------------------------------

    def asked(self, client: int, message: Request) -> None:
        name, arguments = message.name, message.arguments
        if name == "state":
            self._machine.inventory.asked(client, message)
            return
        if name == "explain":
            asker = (self._machine.rank, client, message.request)
            self._machine.explain.asked(
                arguments, lambda found: self._deliver(asker, found, None), peer=False)
            return
        if name == "reserve_name":
            self._reserving[client, message.request] = Reservation(
                arguments["actor_id"], arguments["namespace"], arguments["name"])
        rank = self._rank_for(name, arguments)
        asker = (self._machine.rank, client, message.request)
        if rank == self._machine.rank:
            self._answer(name, arguments, asker)
        else:
            self.forward(rank, name, arguments, asker)

    def forward(
        self, rank: int, name: str, arguments: Any,
        asker: Asker | Callable[[PeerReply], None] | None,
    ) -> int:
        """Ask another node; the number its answer will carry."""
        self._count += 1
        self._forwarded[self._count] = asker
        self._outbox.peers[rank].append(PeerRequest(self._count, name, arguments))
        return self._count

    def _rank_for(self, name: str, arguments: Any) -> int:
        if name in ("kill_actor", "actor_handle"):
            return ids.home_of_actor(arguments["actor_id"])
        if name == "cancel":
            return ids.home_of_object(arguments["object_id"])
        if name == "locations":
            return ids.home_of_object(arguments["ids"][:28])
        if name in ("statistics", "local_locations"):
            return self._machine.rank
        return NAMES_RANK

    def peer_asked(self, rank: int, message: PeerRequest) -> None:
        if message.name == "state":
            self._machine.inventory.peer_asked(rank, message.request, message.arguments)
        elif message.name == "explain":
            self._machine.explain.asked(
                message.arguments,
                lambda found: self._deliver((rank, -1, message.request), found, None), peer=True)
        else:
            self._answer(message.name, message.arguments, (rank, -1, message.request))

    def peer_answered(self, message: PeerReply) -> None:
        asker = self._forwarded.pop(message.request, None)
        if callable(asker):
            asker(message)
        elif asker is not None:
            self._deliver(asker, message.result, message.error)

    def _answer(self, name: str, arguments: Any, asker: Asker) -> None:
        handler = self._handlers.get(name)
        result, error = None, None
        if handler is None:
            error = Failure("ValueError", f"the node knows no request {name!r}")
        else:
            try:
                result = handler(arguments)
            except RequestError as refused:
                error = refused.failure
            except NotYet as wait:
                wait.entry.waiting.append((name, arguments, asker))
                return
        self._deliver(asker, result, error)

    def _deliver(self, asker: Asker, result: Any, error: Failure | None) -> None:
        rank, client, number = asker
        if client < 0:
            self._outbox.peers[rank].append(PeerReply(number, result, error))
            return
        alive = client in self._machine.clients
        if alive:
            to_client = self._outbox.clients[client]
            if type(result) is list and len(encode(result)) > ROWS_BYTES:
                to_client += [Rows(number, part) for part in parts(result)]
                result = []
            to_client.append(Reply(number, result, error))
        reservation = self._reserving.get((client, number)) if self._reserving else None
        if reservation is not None:
            reservation.granted = result is None and error is None
            if not (alive and reservation.granted):
                self._give_up((client, number))

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
                    for name, amount in view.reported.items():
                        free[name] = free.get(name, 0) + max(amount, 0)
        return {name: amount for name, amount in free.items()
                if amount > 0 and "@" not in name and not labels.is_condition(name)}

    # --- names ------------------------------------------------------------------------------------

    def _name_created(self, arguments: Any) -> None:
        self._answer_again(self.names.created(arguments))

    def _release_name(self, arguments: Any) -> None:
        self._answer_again(self.names.release(arguments))

    def _answer_again(self, waiting: list[tuple[str, Any, Asker]]) -> None:
        for name, arguments, asker in waiting:
            self._answer(name, arguments, asker)

    def actor_created(self, actor_id: bytes, namespace: str, name: str) -> None:
        """At its home: CreateActor is here."""
        for key, reservation in list(self._reserving.items()):
            if reservation.actor_id == actor_id:
                del self._reserving[key]
        self._tell_names("name_created", actor_id, namespace, name)

    def actor_died(self, actor_id: bytes, namespace: str, name: str) -> None:
        self._tell_names("release_name", actor_id, namespace, name)

    def _tell_names(self, request: str, actor_id: bytes, namespace: str, name: str) -> None:
        if not name:
            return
        arguments = {"actor_id": actor_id, "namespace": namespace, "name": name}
        if self._machine.rank == NAMES_RANK:
            self._handlers[request](arguments)
        else:
            self.forward(NAMES_RANK, request, arguments, None)

    def client_gone(self, number: int) -> None:
        """Names it has reserved for actors that will not be."""
        for key, reservation in list(self._reserving.items()):
            if key[0] == number and reservation.granted:
                self._give_up(key)

    def _give_up(self, key: tuple[int, int]) -> None:
        reservation = self._reserving.pop(key)
        if reservation.granted:
            self._tell_names("release_name", reservation.actor_id, reservation.namespace,
                             reservation.name)

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
        task_id = ids.task_of_object(arguments["object_id"])
        task = self._machine.tasks.records.get(task_id)
        if arguments.get("force") and task is not None and task.actor_id:
            raise RequestError("ValueError", "force=True is not for calls of actors: it would end "
                               "the actor. To do that there is kill()")
        return self._machine.tasks.cancel(
            task_id, force=bool(arguments.get("force")),
            recursive=bool(arguments.get("recursive")))
